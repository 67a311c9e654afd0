"""The wire of an answer: whole and streamed, byte for byte."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.filters import Comparison, Compound
from tests.server.echo_rag import MODEL, STATS, EchoEmbedder, EchoRag, chat, open_app

pytestmark = pytest.mark.anyio

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USAGE = {
    "prompt_tokens": 20,
    "completion_tokens": 2,
    "total_tokens": 22,
    "prompt_tokens_details": {"cached_tokens": 7},
    "fusionrag": {
        "ttft_ms": 36.0,
        "way": "reuse",
        "predicted_ms": None,
        "predicted_full_ms": None,
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
        "kv_arrival_ms": 0.0,
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
    message = {"role": "assistant", "content": "red planet", "refusal": None, "annotations": []}
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
        "\n\n" + head + '{},"logprobs":null,"finish_reason":"stop"}],"sources":[]}'
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


async def test_sources_travel_on_the_first_chunk_and_on_the_final_one(client) -> None:
    first, *others, final = events_of((await client.post(CHAT, json=chat(stream=True, collection="planets"))).text)
    assert first["sources"] == final["sources"]
    assert first["sources"][0] == MARS
    assert final["choices"][0]["finish_reason"] == "stop"
    assert others and not any("sources" in chunk for chunk in others)


TWO_FACTS = "Mars is red. Venus is hot. Pluto was demoted in those days. Venus is hot"


def cites(number: int, url: str, title: str, document_id: str, begin: int, end: int) -> list[dict]:
    at = {"start_index": begin, "end_index": end}
    return [
        {"type": "url_citation", "index": 2 * number, "url_citation": {"url": url, "title": title, **at}},
        {
            "type": "file_citation",
            "index": 2 * number + 1,
            "file_citation": {"file_id": document_id, "filename": url, **at},
        },
    ]


PLAIN = [
    *cites(0, "planets/mars.md", "Mars", "d1", 0, 12),
    *cites(1, "planets/venus.pdf", "Venus", "d2", 13, 26),
    *cites(2, "planets/venus.pdf", "Venus", "d2", 60, 72),
]
MARKED = [
    *cites(0, "planets/mars.md", "Mars", "d1", 0, 12),
    *cites(1, "planets/venus.pdf", "Venus", "d2", 17, 30),
    *cites(2, "planets/venus.pdf", "Venus", "d2", 68, 80),
]
MARKED_FACTS = "Mars is red. [1] Venus is hot. [2] Pluto was demoted in those days. Venus is hot [2]"


@pytest.mark.parametrize(
    "style, content, annotations",
    [
        (None, TWO_FACTS, PLAIN),
        ("annotations", TWO_FACTS, PLAIN),
        ("inline", MARKED_FACTS, MARKED),
        ("none", TWO_FACTS, []),
    ],
)
async def test_supported_sentences_are_cited_in_the_form_that_is_asked_for_streamed_or_not(
    client, style: str | None, content: str, annotations: list[dict]
) -> None:
    body = chat(TWO_FACTS, collection="planets", citations=style)
    message = (await client.post(CHAT, json=body)).json()["choices"][0]["message"]
    assert (message["content"], message["annotations"]) == (content, annotations)
    chunks = events_of((await client.post(CHAT, json=body | {"stream": True})).text)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("content", "") for d in deltas) == content
    assert [a for d in deltas for a in d.get("annotations", [])] == annotations


async def test_a_citation_is_streamed_on_the_chunk_that_completes_its_sentence(client) -> None:
    body = chat("Mars is red. Venus is hot", collection="planets", stream=True)
    chunks = events_of((await client.post(CHAT, json=body)).text)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert [len(d.get("annotations", [])) for d in deltas] == [0, 0, 0, 2, 0, 0, 2]
    assert deltas[3]["content"] == " Venus"
    assert "content" not in deltas[-1] and chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_marker_of_the_last_sentence_comes_before_the_final_chunk(client) -> None:
    body = chat("Mars is red.", collection="planets", citations="inline", stream=True)
    chunks = events_of((await client.post(CHAT, json=body)).text)
    assert chunks[-2]["choices"][0]["delta"]["content"] == " [1]"
    assert chunks[-2]["choices"][0]["finish_reason"] is None
    assert chunks[-1]["choices"][0]["delta"] == {}


async def test_an_answer_that_breaks_off_is_cited_as_far_as_it_goes(client) -> None:
    body = chat("Mars is red. Venus", collection="planets", max_tokens=3)
    choice = (await client.post(CHAT, json=body)).json()["choices"][0]
    assert (choice["message"]["annotations"], choice["finish_reason"]) == (PLAIN[:2], "length")


TIMING = (
    "queue;dur=1.000, retrieve;dur=2.000, load;dur=3.000, reposition;dur=4.000, "
    "probe;dur=5.000, select;dur=6.000, recompute;dur=7.000, sample;dur=8.000"
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_the_phases_are_in_a_header_streamed_or_not(client, path: str, stream: bool) -> None:
    content = {"prompt": "a b"} if path == TEXT else {"messages": [{"role": "user", "content": "a b"}]}
    reply = await client.post(path, json={"model": MODEL, "stream": stream, **content})
    assert reply.headers["server-timing"] == TIMING


async def test_an_answer_without_a_first_token_has_no_timing(client) -> None:
    assert "server-timing" not in (await client.post(CHAT, json=chat(n=2))).headers
    assert "server-timing" not in (await client.get("/v1/models")).headers


async def test_an_answer_says_which_way_it_went_and_what_was_expected_of_it(rag: EchoRag) -> None:
    rag.engine.stats = replace(STATS, way="prefix", predicted_ms=30.25, predicted_full_ms=40.5, arrival_ms=9.5)
    async with open_app(rag) as client:
        receipt = (await client.post(CHAT, json=chat("a"))).json()["usage"]["fusionrag"]
    found = {name: receipt[name] for name in ("way", "predicted_ms", "predicted_full_ms", "kv_arrival_ms")}
    assert found == {"way": "prefix", "predicted_ms": 30.25, "predicted_full_ms": 40.5, "kv_arrival_ms": 9.5}


async def test_an_explained_answer_says_which_characters_were_recomputed(rag: EchoRag) -> None:
    first, second, third = STATS.chunks
    explained = (replace(first, recomputed=((1, 3),)), replace(second, recomputed=((0, 1), (3, 4))), third)
    rag.engine.stats = replace(STATS, chunks=explained, predicted_full_ms=120.5)
    async with open_app(rag) as client:
        plain = (await client.post(CHAT, json=chat("a", collection="planets"))).json()["usage"]["fusionrag"]
        answer = (await client.post(CHAT, json=chat("a", collection="planets", explain=True))).json()
        options = {"stream": True, "stream_options": {"include_usage": True}, "explain": True}
        *_, last = events_of((await client.post(CHAT, json=chat("a", collection="planets", **options))).text)
    assert [q.explain for q in rag.questions] == [False, True, True]
    assert plain["predicted_full_ms"] == 120.5
    assert not any("recomputed" in chunk for chunk in plain["chunks"])
    receipt = answer["usage"]["fusionrag"]
    assert [chunk["recomputed"] for chunk in receipt["chunks"]] == [[[0, 4], [5, 7]], [[9, 12]], []]
    assert last["usage"]["fusionrag"]["chunks"] == receipt["chunks"]


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


async def test_the_embedding_model_is_listed_beside_the_language_model() -> None:
    async with open_app(EchoRag(embedder=EchoEmbedder())) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        found = (await client.get("/v1/models/acme/letters-1")).json()
    assert [model["id"] for model in listed] == [MODEL, "acme/letters-1"]
    assert found == listed[1] and "max_model_len" not in found


async def test_filters_reach_the_search_and_need_something_to_search(client, rag: EchoRag) -> None:
    condition = {"type": "and", "filters": [{"type": "gt", "key": "year", "value": 1990}]}
    assert (await client.post(CHAT, json=chat(collection="planets", filters=condition))).status_code == 200
    assert rag.questions[0].filter == Compound("and", (Comparison("year", "gt", 1990),))
    for body in (chat(filters=condition), chat(collection="planets", filters={"type": "near"})):
        refused = await client.post(CHAT, json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"].split(".")[0] == "filters"


async def test_an_unknown_form_of_citations_is_refused_by_name(client) -> None:
    refused = await client.post(CHAT, json=chat(collection="planets", citations="footnotes"))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "citations")
