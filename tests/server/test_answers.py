"""The wire of an answer: whole and streamed, byte for byte."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.echo_rag import MODEL, EchoRag, chat, open_app

pytestmark = pytest.mark.anyio

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USAGE = {
    "prompt_tokens": 20,
    "completion_tokens": 2,
    "total_tokens": 22,
    "prompt_tokens_details": {"cached_tokens": 7},
    "fusionrag": {
        "ttft_ms": 36.0,
        "phases_ms": {
            "queue": 1.0,
            "retrieve": 2.0,
            "load": 3.0,
            "reposition": 4.0,
            "probe": 5.0,
            "select": 6.0,
            "recompute": 7.0,
            "sample": 8.0,
        },
        "reused_tokens": 7,
        "recomputed_tokens": 2,
        "computed_tokens": 11,
        "chunks": [
            {"chunk_id": "c1", "source": "host", "kind": "fused", "num_tokens": 4, "num_recomputed": 1},
            {"chunk_id": "c2", "source": "disk", "kind": "raw", "num_tokens": 5, "num_recomputed": 1},
            {"chunk_id": "c3", "source": "computed", "kind": "raw", "num_tokens": 6, "num_recomputed": 0},
        ],
    },
}
MARS = {
    "index": 1,
    "chunk_id": "c1",
    "document_id": "d1",
    "title": "Mars",
    "source": "planets/mars.md",
    "text": "Mars is red.",
    "score": 0.9,
    "page": None,
}


def events_of(body: str) -> list[dict]:
    """The JSON of all events; checks that the stream has the right frame."""
    *events, done, rest = body.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(e.startswith("data: {") and "\n" not in e for e in events)
    return [json.loads(e.removeprefix("data: ")) for e in events]


async def test_a_whole_chat_answer_has_exactly_these_fields(client) -> None:
    reply = await client.post(CHAT, json=chat("red planet", collection="planets"))
    answer = reply.json()
    assert reply.headers["content-type"] == "application/json"
    assert answer.pop("id") == "chatcmpl-" + reply.headers["x-request-id"]
    assert abs(answer.pop("created") - time.time()) < 60
    assert answer.pop("sources")[0] == MARS
    citations = answer["choices"][0]["message"].pop("annotations")
    assert citations[1] == {
        "type": "url_citation",
        "url_citation": {"url": "planets/venus.pdf", "title": "Venus", "start_index": 0, "end_index": 0},
    }
    message = {"role": "assistant", "content": "red planet", "refusal": None}
    assert answer == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }


async def test_a_whole_completion_has_exactly_these_fields(client) -> None:
    answer = (await client.post(TEXT, json={"model": MODEL, "prompt": "red planet"})).json()
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": MODEL,
        "choices": [{"index": 0, "text": "red planet", "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
        "sources": [],
    }


async def test_a_streamed_chat_answer_is_exactly_these_bytes(client) -> None:
    reply = await client.post(CHAT, json=chat("röd planet", stream=True))
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in reply.headers
    created = events_of(reply.text)[0]["created"]
    head = (
        f'data: {{"id":"chatcmpl-{reply.headers["x-request-id"]}","object":"chat.completion.chunk",'
        f'"created":{created},"model":"{MODEL}","choices":[{{"index":0,"delta":'
    )
    assert reply.content.decode("ascii") == (
        head + r'{"role":"assistant","content":"r\u00f6d"},"logprobs":null,"finish_reason":null}],"sources":[]}'
        "\n\n" + head + '{"content":" planet"},"logprobs":null,"finish_reason":null}]}'
        "\n\n" + head + '{},"logprobs":null,"finish_reason":"stop"}]}'
        "\n\ndata: [DONE]\n\n"
    )


async def test_a_streamed_completion_is_a_row_of_text_chunks(client) -> None:
    reply = await client.post(TEXT, json={"model": MODEL, "prompt": "a b", "stream": True})
    choices = [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in events_of(reply.text)]
    assert choices == [("a", None), (" b", None), ("", "stop")]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_usage_is_one_last_chunk_without_choices_if_asked_for(client, path: str) -> None:
    content = {"prompt": "a b"} if path == TEXT else {"messages": [{"role": "user", "content": "a b"}]}
    body = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, **content}
    *others, last = events_of((await client.post(path, json=body)).text)
    assert last["choices"] == []
    assert last["usage"] == USAGE
    assert not any("usage" in chunk for chunk in others)


async def test_sources_travel_on_the_first_chunk_alone(client) -> None:
    first, *others = events_of((await client.post(CHAT, json=chat(stream=True, collection="planets"))).text)
    assert first["sources"][0] == MARS
    assert not any("sources" in chunk for chunk in others)


async def test_the_role_waits_for_the_first_content(client) -> None:
    chunks = events_of((await client.post(CHAT, json=chat("~ ~ word ~", stream=True))).text)
    assert [c["choices"][0]["delta"] for c in chunks] == [{"role": "assistant", "content": " word"}, {}]


async def test_an_empty_answer_still_has_its_role(client) -> None:
    chunks = events_of((await client.post(CHAT, json=chat("~", stream=True))).text)
    assert [c["choices"][0]["delta"] for c in chunks] == [{"role": "assistant", "content": ""}, {}]
    whole = (await client.post(CHAT, json=chat("~"))).json()
    assert whole["choices"][0]["message"]["content"] == ""


async def test_a_cut_answer_says_length(client) -> None:
    assert (await client.post(CHAT, json=chat("a b c", max_tokens=2))).json()["choices"][0]["finish_reason"] == "length"
    chunks = events_of((await client.post(CHAT, json=chat("a b c", max_tokens=2, stream=True))).text)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["~", "a", "ö", "日本", "\u2028", "\x85", '"', "\\", "🙂"]), min_size=1, max_size=8))
def test_the_streamed_text_is_the_whole_text(words: list[str]) -> None:
    async def both() -> tuple[dict, list[dict]]:
        async with open_app(EchoRag()) as client:
            whole = (await client.post(TEXT, json={"model": MODEL, "prompt": "x" + " ".join(words)})).json()
            reply = await client.post(TEXT, json={"model": MODEL, "prompt": "x" + " ".join(words), "stream": True})
            return whole, events_of(reply.text)

    whole, chunks = asyncio.run(both())
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1


async def test_concurrent_streams_interleave_and_do_not_mix(rag: EchoRag) -> None:
    rag.engine.delay_s = 0.005

    async def ask(client, letter: str) -> str:
        events = events_of((await client.post(TEXT, json=body(letter))).text)
        return "".join(e["choices"][0]["text"] for e in events)

    def body(letter: str) -> dict:
        return {"model": MODEL, "prompt": " ".join(letter * 3 for _ in range(10)), "stream": True}

    async with open_app(rag) as client:
        answers = await asyncio.gather(*(ask(client, letter) for letter in "abcdefgh"))
    assert answers == [" ".join(letter * 3 for _ in range(10)) for letter in "abcdefgh"]
    assert rag.engine.num_steps < 40, "one after the other, eight answers of ten words take eighty steps"


async def test_models_are_listed_and_found_by_name(client) -> None:
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", 64)
    assert (await client.get(f"/v1/models/{MODEL}")).json() == model
    missing = await client.get("/v1/models/gpt-4o")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
