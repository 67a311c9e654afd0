"""What requests mean: every parameter is honoured, provably without effect, or refused by name."""

from __future__ import annotations

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as OpenAIChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as OpenAICompletionParams

from fusionrag.rag import InlineDocument, Turn
from fusionrag.sampling import SamplingParams
from server.config import ServerConfig
from server.protocol.completions import ChatCompletionRequest, CompletionRequest
from tests.server.echo_rag import MODEL, EchoRag, chat, open_app

pytestmark = pytest.mark.anyio

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
REFUSED = {
    "n": 2,
    "logprobs": True,
    "top_logprobs": 3,
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "logit_bias": {"50256": -100},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "store": True,
    "service_tier": "priority",
    "reasoning_effort": "high",
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "stream_options": {"include_obfuscation": True},
}
WITHOUT_EFFECT = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "auto",
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "store": False,
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "user": "u-1",
    "safety_identifier": "u-1",
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
}
MALFORMED = {
    "model": 7,
    "messages": "hello",
    "temperature": "hot",
    "top_p": True,
    "max_tokens": -1,
    "max_completion_tokens": 0,
    "stop": [1],
    "seed": 2.5,
    "stream": "yes",
    "stream_options": "usage",
    "collection": "",
    "documents": [],
    "retrieval_top_k": 0,
    "ranking_options": "strict",
    "recompute_ratio": 1.5,
    "method": "magic",
    "top_k": -1,
    "min_p": 2,
    "repetition_penalty": 0,
    "ignore_eos": "no",
    "user": 1,
}


def param_of(reply) -> str | None:
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error["param"]


@pytest.mark.parametrize(
    "ours, theirs",
    [(ChatCompletionRequest, OpenAIChatParams), (CompletionRequest, OpenAICompletionParams)],
)
def test_every_parameter_of_the_official_client_is_known(ours, theirs) -> None:
    assert set(theirs.__annotations__) - set(ours.model_fields) == set()


@pytest.mark.parametrize("name", REFUSED)
async def test_a_parameter_that_would_have_no_effect_is_refused_by_name(client, name: str) -> None:
    reply = await client.post(CHAT, json=chat(**{name: REFUSED[name]}))
    assert param_of(reply).split(".")[0] == name
    assert name in reply.json()["error"]["message"]


async def test_parameters_are_accepted_at_the_values_that_ask_for_nothing(client) -> None:
    assert (await client.post(CHAT, json=chat(**WITHOUT_EFFECT))).status_code == 200
    assert (await client.post(CHAT, json=chat(**dict.fromkeys(WITHOUT_EFFECT)))).status_code == 200


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_value_is_refused_by_name(client, name: str) -> None:
    assert param_of(await client.post(CHAT, json=chat() | {name: MALFORMED[name]})).split(".")[0] == name


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_an_unknown_parameter_is_refused_by_name(client, path: str) -> None:
    body = chat(temprature=1) if path == CHAT else {"model": MODEL, "prompt": "x", "temprature": 1}
    assert param_of(await client.post(path, json=body)) == "temprature"


@pytest.mark.parametrize(
    "name, value",
    [("best_of", 2), ("echo", True), ("logprobs", 0), ("suffix", "x"), ("collection", "planets"), ("method", "full")],
)
async def test_completions_refuse_what_does_not_apply_to_a_plain_prompt(client, name: str, value: object) -> None:
    assert param_of(await client.post(TEXT, json={"model": MODEL, "prompt": "x", name: value})) == name


@pytest.mark.parametrize(
    "more, param",
    [
        ({"collection": "planets", "documents": [{"text": "t"}]}, "documents"),
        ({"retrieval_top_k": 3}, "retrieval_top_k"),
        ({"retrieval_top_k": 3, "documents": [{"text": "t"}]}, "retrieval_top_k"),
        ({"retrieval_top_k": 10_000, "collection": "planets"}, "retrieval_top_k"),
        ({"ranking_options": {"score_threshold": 0.5}}, "ranking_options"),
        ({"ranking_options": {"score_threshold": 2}, "collection": "planets"}, "ranking_options.score_threshold"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a", "name": "bob"}]}, "messages.0.name"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"collection": "x" * 257}, "collection"),
        ({"model": "x" * 257}, "model"),
        ({"documents": [{"title": "no text"}]}, "documents.0.text"),
    ],
)
async def test_what_does_not_fit_together_is_refused_with_the_parameter_at_fault(client, more, param: str) -> None:
    assert param_of(await client.post(CHAT, json=chat() | more)) == param


async def test_an_image_part_is_refused(client) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    reply = await client.post(CHAT, json=chat() | {"messages": [{"role": "user", "content": [image]}]})
    assert param_of(reply) == "messages.0.content"
    assert "image_url" in reply.json()["error"]["message"]


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [1, 2], [[1, 2]], None])
async def test_completions_take_exactly_one_prompt_of_text(client, prompt: object) -> None:
    assert param_of(await client.post(TEXT, json={"model": MODEL, "prompt": prompt})) == "prompt"


async def test_completions_accept_one_prompt_in_a_list(client, rag: EchoRag) -> None:
    assert (await client.post(TEXT, json={"model": MODEL, "prompt": ["a b"]})).status_code == 200
    assert rag.questions[0].prompt == "a b"


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_an_unknown_model_is_404(client, path: str) -> None:
    content = {"prompt": "a"} if path == TEXT else {"messages": [{"role": "user", "content": "a"}]}
    reply = await client.post(path, json={"model": "gpt-4o", **content})
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert reply.json()["error"]["param"] == "model"


async def test_an_unknown_collection_is_404(client) -> None:
    reply = await client.post(CHAT, json=chat(collection="stars"))
    assert reply.status_code == 404
    assert reply.json()["error"]["param"] == "collection"


async def test_sampling_parameters_reach_the_engine_unchanged(client, rag: EchoRag) -> None:
    extensions = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "ignore_eos": True}
    body = chat(temperature=0.5, top_p=0.9, max_completion_tokens=7, stop="END", seed=-3, **extensions)
    assert (await client.post(CHAT, json=body)).status_code == 200
    expected = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=7, stop=("END",), seed=-3, **extensions)
    assert rag.questions[0].sampling == expected


async def test_answers_are_greedy_unless_asked_otherwise(client, rag: EchoRag) -> None:
    await client.post(CHAT, json=chat())
    assert rag.questions[0].sampling == SamplingParams()
    assert rag.questions[0].sampling.temperature == 0


async def test_reuse_parameters_change_the_servers_own_and_nothing_else(client, rag: EchoRag) -> None:
    await client.post(CHAT, json=chat())
    await client.post(CHAT, json=chat(recompute_ratio=0.4))
    await client.post(CHAT, json=chat(method="full"))
    plain, ratio, method = (q.reuse for q in rag.questions)
    assert plain is None
    assert (ratio.recompute_ratio, ratio.method) == (0.4, rag.reuse.method)
    assert (method.recompute_ratio, method.method) == (rag.reuse.recompute_ratio, "full")


async def test_a_conversation_arrives_turn_by_turn(client, rag: EchoRag) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": [], "annotations": [{"any": 1}]},
        {"role": "user", "content": "three"},
    ]
    assert (await client.post(CHAT, json={"model": MODEL, "messages": messages})).status_code == 200
    assert rag.questions[0].turns == (
        Turn("system", "be brief"),
        Turn("user", "one\ntwo"),
        Turn("assistant", "ok"),
        Turn("user", "three"),
    )


async def test_documents_are_used_instead_of_any_collection(rag: EchoRag) -> None:
    document = {"title": "Moon", "text": "The moon is grey.", "id": "m"}
    async with open_app(rag, ServerConfig(default_collection="planets")) as client:
        reply = await client.post(CHAT, json=chat(documents=[document]))
    assert rag.questions[0].documents == (InlineDocument("Moon", "The moon is grey.", "m"),)
    assert rag.questions[0].collections == ()
    assert [s["title"] for s in reply.json()["sources"]] == ["Moon"]


async def test_the_default_collection_answers_chats_but_not_plain_prompts(rag: EchoRag) -> None:
    async with open_app(rag, ServerConfig(default_collection="planets")) as client:
        await client.post(CHAT, json=chat(retrieval_top_k=3))
        await client.post(TEXT, json={"model": MODEL, "prompt": "x"})
    assert [q.collections for q in rag.questions] == [("planets",), ()]
    assert [q.search and q.search.top_k for q in rag.questions] == [3, None]


async def test_a_chat_can_say_how_to_search(rag: EchoRag) -> None:
    ranking = {"score_threshold": 0.5, "hybrid_search": {"embedding_weight": 1, "text_weight": 3}}
    async with open_app(rag) as client:
        reply = await client.post(CHAT, json=chat(collection="planets", ranking_options=ranking))
    assert reply.status_code == 200
    search = rag.questions[0].search
    assert search is not None and (search.score_threshold, search.lexical_weight) == (0.5, 0.75)
    assert search.top_k == rag.search.top_k
