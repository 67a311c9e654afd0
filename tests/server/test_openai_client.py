"""The official client against the real server on a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from server.config import ServerConfig
from tests.server.echo_rag import MODEL, EchoEngine, EchoRag, LiveServer, eventually, serving

pytestmark = pytest.mark.anyio

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "the red planet"}]}

FACTS = {"model": MODEL, "messages": [{"role": "user", "content": "Mars is red. Venus is hot"}]}


def client_of(live: LiveServer, **more: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url + "/v1", api_key=more.pop("api_key", "none"), max_retries=0, **more)


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with client_of(live) as client:
        yield client


def test_a_whole_chat_answer_is_read_with_usage_sources_and_citations(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASK, extra_body={"collection": "planets"})
    assert answer.choices[0].message.content == "the red planet"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (20, 3, 23)
    assert answer.usage.prompt_tokens_details.cached_tokens == 7
    assert answer.usage.fusionrag["recomputed_tokens"] == 2
    assert answer.sources[0]["title"] == "Mars"
    assert answer.id == "chatcmpl-" + answer._request_id
    cited = client.chat.completions.create(**FACTS, extra_body={"collection": "planets"}).choices[0].message
    assert [a.type for a in cited.annotations] == ["url_citation", "file_citation"] * 2
    assert [a.url_citation.url for a in cited.annotations[::2]] == ["planets/mars.md", "planets/venus.pdf"]
    assert cited.annotations[2].url_citation.start_index == len("Mars is red. ")


def test_a_streamed_chat_answer_is_read_chunk_by_chunk(client: openai.OpenAI) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"collection": "planets"}}
    *chunks, usage = client.chat.completions.create(**ASK, **options)
    assert [c.choices[0].delta.content for c in chunks] == ["the", " red", " planet", None]
    assert [c.choices[0].delta.role for c in chunks] == ["assistant", None, None, None]
    assert [c.choices[0].finish_reason for c in chunks] == [None, None, None, "stop"]
    assert chunks[0].sources[1]["page"] == chunks[-1].sources[1]["page"] == 3
    assert usage.choices == [] and usage.usage.total_tokens == 23


def test_the_clients_own_stream_accumulator_understands_the_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**ASK) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == "the red planet"


@pytest.mark.parametrize("style", ["annotations", "inline"])
def test_the_accumulator_puts_the_citations_of_a_stream_together_as_they_are_sent_whole(
    client: openai.OpenAI, style: str
) -> None:
    """It merges list entries by their `index`, and raises where one has none."""
    extra = {"collection": "planets", "citations": style}
    whole = client.chat.completions.create(**FACTS, extra_body=extra).choices[0].message
    with client.chat.completions.stream(**FACTS, extra_body=extra) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.content == whole.content
    assert len(whole.annotations) == 4
    merged = [a.to_dict(exclude_none=True) for a in streamed.annotations]
    assert merged == [a.to_dict() for a in whole.annotations]


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    said = client.chat.completions.create(**FACTS, extra_body={"collection": "planets"}).choices[0].message
    messages = [*FACTS["messages"], said, {"role": "user", "content": "and Pluto?"}]
    again = client.chat.completions.create(model=MODEL, messages=messages)
    assert again.choices[0].message.content == "and Pluto?"


def test_completions_are_read_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="a b", max_tokens=1)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("a", "length")
    chunks = client.completions.create(model=MODEL, prompt="a b", stream=True)
    assert "".join(c.choices[0].text for c in chunks) == "a b"


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "fusionrag"


def test_errors_become_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**ASK, n=2)
    assert (bad.value.param, bad.value.type) == ("n", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 65)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**ASK | {"model": "gpt-4o"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL, prompt="!error")


def test_a_body_of_megabytes_is_refused_in_a_way_the_client_can_read(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as long:
        client.completions.create(model=MODEL, prompt="x" * (5 << 20))
    assert long.value.status_code == 413


def test_an_error_in_mid_stream_raises(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="could not answer"):
        list(client.completions.create(model=MODEL, prompt="a !error", stream=True))


def test_a_wrong_key_and_a_full_queue_become_the_clients_exceptions() -> None:
    config = ServerConfig(api_key="sk-1", drain_timeout_s=0)
    with serving(EchoRag(EchoEngine(max_queue=0)), config) as live:
        with client_of(live, api_key="sk-2") as wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        with client_of(live, api_key="sk-1") as right, pytest.raises(openai.RateLimitError) as full:
            right.chat.completions.create(**ASK)
        assert full.value.response.headers["retry-after"] == "1"


def test_closing_a_stream_early_frees_the_request(client: openai.OpenAI, rag: EchoRag) -> None:
    rag.engine.delay_s = 0.01
    stream = client.completions.create(model=MODEL, prompt="word " * 60, stream=True)
    next(iter(stream))
    stream.close()
    eventually(lambda: len(rag.engine.cancelled) == 1)
    assert rag.engine.live == {}


async def test_async_streams_of_many_askers_interleave_on_the_wire(live: LiveServer, rag: EchoRag) -> None:
    rag.engine.delay_s = 0.01
    arrivals: list[int] = []

    async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:

        async def ask(number: int) -> str:
            prompt = f"{number} " * 8
            text = ""
            async for chunk in await client.completions.create(model=MODEL, prompt=prompt, stream=True):
                arrivals.append(number)
                text += chunk.choices[0].text
            return text

        texts = await asyncio.gather(*(ask(i) for i in range(6)))
    assert texts == [" ".join([str(i)] * 8) for i in range(6)]
    first_end = min(len(arrivals) - arrivals[::-1].index(i) for i in range(6))
    assert set(arrivals[:first_end]) == set(range(6)), "all have begun before the first has ended"
