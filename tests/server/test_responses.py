"""The Responses API: its wire, its tool, what is kept, and the official client as the judge."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import TypeAdapter

from fusionrag.rag import Prepared, Question, Source, Turn
from fusionrag.sampling import SamplingParams
from index import Catalogue, Retriever
from index.config import SearchConfig
from index.errors import NotFound
from index.filters import Comparison
from index.stored_responses import StoredResponses
from server.config import ServerConfig
from server.protocol.responses import ResponseRequest
from tests.server.echo_rag import MODEL, STATS, EchoEngine, EchoRag, LiveServer, open_app, serving, until
from tests.server.live_collections import open_live

pytestmark = pytest.mark.anyio

PATH = "/v1/responses"
SEARCH = {"type": "file_search", "vector_store_ids": ["planets"]}
FACTS = "Mars is red. Venus is hot"


def ask(given: object = "red planet", /, **more: object) -> dict[str, object]:
    return {"model": MODEL, "input": given, **more}


@pytest.fixture
def rag(tmp_path: Path) -> Iterator[EchoRag]:
    with Catalogue(tmp_path / "catalogue.sqlite") as catalogue:
        yield EchoRag(catalogue=catalogue)


@pytest.fixture
async def client(rag: EchoRag) -> AsyncIterator[httpx.AsyncClient]:
    async with open_app(rag) as client:
        yield client


def events_of(body: str) -> list[dict]:
    """The JSON of all events; checks that each has the name of its type, and that they are counted."""
    *events, rest = body.split("\n\n")
    assert rest == ""
    found = []
    for number, event in enumerate(events):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        assert found[-1]["sequence_number"] == number
    return found


def error_of(reply: httpx.Response, status: int) -> dict:
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


# -- the wire ----------------------------------------------------------------------------------------------------------


async def test_a_whole_response_has_exactly_these_fields(client) -> None:
    body = ask(FACTS, tools=[SEARCH], instructions="be brief", metadata={"a": "b"}, temperature=0.5, user="u")
    reply = await client.post(PATH, json=body)
    answer = reply.json()
    key = reply.headers["x-request-id"]
    assert abs(answer.pop("created_at") - time.time()) < 60
    assert abs(answer.pop("completed_at") - time.time()) < 60
    assert answer.pop("usage").pop("fusionrag")["recomputed_tokens"] == 2
    assert answer == {
        "id": f"resp_{key}",
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": MODEL,
        "output": [
            {
                "id": f"fs_{key}",
                "type": "file_search_call",
                "status": "completed",
                "queries": [FACTS],
                "results": None,
            },
            {
                "id": f"msg_{key}",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {
                        "type": "output_text",
                        "text": FACTS,
                        "annotations": [
                            {"type": "file_citation", "index": 12, "file_id": "d1", "filename": "planets/mars.md"},
                            {"type": "file_citation", "index": 25, "file_id": "d2", "filename": "planets/venus.pdf"},
                        ],
                        "logprobs": [],
                    }
                ],
            },
        ],
        "instructions": "be brief",
        "max_output_tokens": 128,
        "temperature": 0.5,
        "top_p": 1.0,
        "tools": [SEARCH | {"max_num_results": None, "filters": None, "ranking_options": None}],
        "tool_choice": "auto",
        "previous_response_id": None,
        "store": True,
        "metadata": {"a": "b"},
        "user": "u",
        "parallel_tool_calls": True,
        "background": False,
        "service_tier": "default",
        "text": {"format": {"type": "text"}},
        "top_logprobs": 0,
        "truncation": "disabled",
    }


async def test_usage_is_counted_in_the_words_of_responses(client) -> None:
    usage = (await client.post(PATH, json=ask("a b"))).json()["usage"]
    assert usage.pop("fusionrag")["phases_ms"]["probe"] == 5.0
    assert usage == {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 7, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 22,
    }


async def test_the_events_of_a_stream_come_in_openais_order(client) -> None:
    reply = await client.post(PATH, json=ask("Mars is red.", tools=[SEARCH], stream=True))
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(reply.text)
    assert [e["type"].removeprefix("response.") for e in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "file_search_call.in_progress",
        "file_search_call.searching",
        "file_search_call.completed",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.delta",
        "output_text.annotation.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [e["delta"] for e in events if e["type"].endswith("delta")] == ["Mars", " is", " red."]
    assert [e["output_index"] for e in events[2:-1]] == [0] * 5 + [1] * 9
    assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
    assert events[2]["item"]["status"] == "in_progress"
    assert events[12]["annotation"] == events[14]["part"]["annotations"][0]
    assert events[12]["annotation_index"] == 0
    assert (events[6]["item"], events[15]["item"]) == tuple(events[-1]["response"]["output"])


async def test_without_a_search_the_message_is_the_first_item(client) -> None:
    events = events_of((await client.post(PATH, json=ask("a", stream=True))).text)
    assert not any("file_search" in e["type"] for e in events)
    assert {e["output_index"] for e in events if "output_index" in e} == {0}
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["message"]


async def test_each_event_is_one_that_the_official_client_knows(client) -> None:
    known = TypeAdapter(ResponseStreamEvent)
    body = ask(FACTS, tools=[SEARCH], include=["file_search_call.results"], stream=True)
    for event in events_of((await client.post(PATH, json=body)).text):
        assert known.validate_python(event).type == event["type"]


async def test_a_stream_adds_up_to_what_is_sent_whole(client) -> None:
    body = ask(FACTS, tools=[SEARCH], include=["file_search_call.results"])
    whole = (await client.post(PATH, json=body)).json()
    events = events_of((await client.post(PATH, json=body | {"stream": True})).text)
    streamed = events[-1]["response"]
    for response in (whole, streamed):
        key = response.pop("id").removeprefix("resp_")
        for item in response["output"]:
            item["id"] = item["id"].replace(key, "")
        del response["created_at"], response["completed_at"]
    assert streamed == whole
    text = next(e for e in events if e["type"] == "response.output_text.done")["text"]
    assert text == "".join(e["delta"] for e in events if e["type"].endswith("delta")) == FACTS


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_that_is_cut_off_is_incomplete(client, stream: bool) -> None:
    reply = await client.post(PATH, json=ask("a b c", max_output_tokens=2, stream=stream))
    response = events_of(reply.text)[-1]["response"] if stream else reply.json()
    assert (response["status"], response["completed_at"]) == ("incomplete", None)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    if stream:
        assert events_of(reply.text)[-1]["type"] == "response.incomplete"


async def test_an_empty_answer_is_a_message_without_text(client) -> None:
    events = events_of((await client.post(PATH, json=ask("~", stream=True))).text)
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""
    assert not any(e["type"].endswith("delta") for e in events)


async def test_a_failure_in_mid_stream_is_an_error_and_a_failed_response(client) -> None:
    reply = await client.post(PATH, json=ask("a !error", stream=True))
    assert reply.status_code == 200 and "secret" not in reply.text
    *_, error, failed = events_of(reply.text)
    assert (error["type"], failed["type"]) == ("error", "response.failed")
    assert (error["code"], error["param"]) == ("server_error", None)
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": error["message"]}
    assert reply.headers["x-request-id"] in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_fails_before_the_first_event_has_its_status(stream: bool) -> None:
    async with open_app(EchoRag(EchoEngine(max_queue=0))) as client:
        error = error_of(await client.post(PATH, json=ask(stream=stream)), 429)
        assert error["code"] == "queue_full"
        error = error_of(await client.post(PATH, json=ask("word " * 65, stream=stream)), 400)
        assert error["code"] == "context_length_exceeded"
        stores = [SEARCH | {"vector_store_ids": ["planets", "vs_none"]}]
        error = error_of(await client.post(PATH, json=ask(tools=stores, stream=stream)), 404)
        assert error["message"] == "No vector store found with id 'vs_none'."


@pytest.mark.parametrize("stream", [False, True])
async def test_the_phases_are_in_a_header(client, stream: bool) -> None:
    reply = await client.post(PATH, json=ask(stream=stream))
    assert reply.headers["server-timing"].startswith("queue;dur=1.000, retrieve;dur=2.000, load;dur=3.000")


async def test_a_response_is_logged_and_counted_like_a_completion(client, caplog) -> None:
    caplog.set_level(logging.INFO)
    reply = await client.post(PATH, json=ask("zanzibar", tools=[SEARCH]))
    (record,) = [r for r in caplog.records if r.name == "fusionrag.request"]
    line = json.loads(record.getMessage())
    assert (line["route"], line["collection"], line["finish_reason"]) == (PATH, "planets", "stop")
    assert line["request_id"] == reply.headers["x-request-id"]
    assert "zanzibar" not in caplog.text
    assert 'fusionrag_requests_total{finish_reason="stop"} 1.0' in (await client.get("/metrics")).text


async def test_a_client_that_hangs_up_frees_its_request(rag: EchoRag) -> None:
    rag.engine.delay_s = 0.01
    with serving(rag, ServerConfig(drain_timeout_s=0)) as live:
        async with (
            httpx.AsyncClient(base_url=live.url) as client,
            client.stream("POST", PATH, json=ask("word " * 60, stream=True)) as reply,
        ):
            await anext(reply.aiter_lines())
        await until(lambda: len(rag.engine.cancelled) == 1)


# -- what a request means ----------------------------------------------------------------------------------------------


def test_every_parameter_of_the_official_client_is_known() -> None:
    assert set(ResponseCreateParamsBase.__annotations__) - set(ResponseRequest.model_fields) == set()


REFUSED = {
    "background": True,
    "conversation": "conv_1",
    "include": ["message.output_text.logprobs"],
    "max_tool_calls": 1,
    "prompt": {"id": "pmpt_1"},
    "reasoning": {"effort": "high"},
    "service_tier": "flex",
    "stream_options": {"include_obfuscation": True},
    "text": {"format": {"type": "json_object"}},
    "tools": [{"type": "web_search"}],
    "top_logprobs": 2,
    "truncation": "auto",
    "temprature": 1,
    "store": 1,
    "max_output_tokens": 0,
    "temperature": 3,
    "tool_choice": "required",
    "previous_response_id": "",
    "metadata": {"k" * 65: "v"},
    "recompute_ratio": 2,
    "method": "magic",
    "model": 7,
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_not_honoured_or_malformed_is_refused_by_name(client, name: str) -> None:
    error = error_of(await client.post(PATH, json=ask() | {name: REFUSED[name]}), 400)
    assert error["param"].split(".")[0] == name


async def test_parameters_are_accepted_at_the_values_that_ask_for_nothing(client) -> None:
    off = {
        "background": False,
        "include": [],
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "reasoning": {},
        "safety_identifier": "u",
        "service_tier": "auto",
        "stream_options": {},
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "truncation": "disabled",
        "user": "u",
    }
    reply = await client.post(PATH, json=ask(**off))
    assert reply.status_code == 200, reply.text
    assert (await client.post(PATH, json=ask(**dict.fromkeys(off)))).status_code == 200


@pytest.mark.parametrize(
    "given, says",
    [
        ("", "empty"),
        (" \n", "empty"),
        ([], "at least 1"),
        ([{"role": "assistant", "content": "a"}], "role 'user'"),
        ([{"role": "tool", "content": "a"}], "user"),
        ([{"type": "function_call_output", "call_id": "c", "output": "o"}], "function_call_output"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}], "input_image"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}], "input_file"),
        (["text"], "str"),
        (7, "list"),
        (None, "list"),
    ],
)
async def test_only_text_is_taken_as_input(client, given: object, says: str) -> None:
    error = error_of(await client.post(PATH, json=ask(given)), 400)
    assert error["param"].split(".")[0] == "input"
    assert says in error["message"]


async def test_a_conversation_arrives_turn_by_turn(client, rag: EchoRag) -> None:
    given = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
        {"type": "file_search_call", "id": "fs_1", "queries": ["one"], "status": "completed", "results": None},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "ok", "annotations": [{"any": 1}], "logprobs": []}],
        },
        {"type": "message", "role": "user", "content": "three"},
    ]
    assert (await client.post(PATH, json=ask(given, instructions="be brief"))).status_code == 200
    assert rag.questions[0].turns == (
        Turn("system", "be brief"),
        Turn("system", "be kind"),
        Turn("user", "one\ntwo"),
        Turn("assistant", "ok"),
        Turn("user", "three"),
    )


async def test_sampling_and_reuse_reach_the_engine(client, rag: EchoRag) -> None:
    body = ask(temperature=0.5, top_p=0.9, max_output_tokens=7, recompute_ratio=0.4, method="epic", explain=True)
    assert (await client.post(PATH, json=body)).status_code == 200
    (question,) = rag.questions
    assert question.sampling == SamplingParams(temperature=0.5, top_p=0.9, max_tokens=7)
    assert (question.reuse.method, question.reuse.recompute_ratio) == ("epic", 0.4)
    assert question.explain


async def test_an_explained_response_says_which_characters_were_recomputed(rag: EchoRag) -> None:
    first, *others = STATS.chunks
    rag.engine.stats = replace(STATS, chunks=(replace(first, recomputed=((1, 2),)), *others))
    body = ask("a", tools=[SEARCH], explain=True, include=["file_search_call.results"])
    async with open_app(rag) as client:
        answer = (await client.post(PATH, json=body)).json()
    chunk = answer["usage"]["fusionrag"]["chunks"][0]
    result = answer["output"][0]["results"][0]
    assert (chunk["chunk_id"], chunk["recomputed"]) == (result["chunk_id"], [[0, 4]])
    assert result["text"][:4] == "Mars"


async def test_the_tool_says_where_and_how_is_searched(client, rag: EchoRag) -> None:
    tool = SEARCH | {
        "vector_store_ids": ["planets", "planets"],
        "max_num_results": 3,
        "filters": {"type": "eq", "key": "lang", "value": "en"},
        "ranking_options": {
            "ranker": "none",
            "score_threshold": 0.25,
            "hybrid_search": {"embedding_weight": 1, "text_weight": 3},
        },
    }
    rag.search = SearchConfig(top_k=9, reranker="some/model", rerank_candidates=11)
    assert (await client.post(PATH, json=ask(tools=[tool]))).status_code == 200
    (question,) = rag.questions
    assert question.collections == ("planets", "planets")
    assert question.filter == Comparison("lang", "eq", "en")
    changes = {"top_k": 3, "score_threshold": 0.25, "search_mode": "hybrid", "lexical_weight": 0.75, "reranker": ""}
    assert question.search == replace(rag.search, **changes)


@pytest.mark.parametrize("choice", [None, "auto", "required", {"type": "file_search"}])
async def test_a_tool_that_is_offered_is_used(client, rag: EchoRag, choice) -> None:
    answer = (await client.post(PATH, json=ask(tools=[SEARCH], tool_choice=choice))).json()
    assert answer["output"][0]["type"] == "file_search_call"
    assert answer["tool_choice"] == (choice or "auto")
    assert (rag.questions[0].collections, rag.questions[0].search) == (("planets",), None)


async def test_a_tool_that_is_turned_off_is_not_used(client, rag: EchoRag) -> None:
    answer = (await client.post(PATH, json=ask(tools=[SEARCH], tool_choice="none"))).json()
    assert [item["type"] for item in answer["output"]] == ["message"]
    assert rag.questions[0].collections == ()


async def test_results_are_there_if_they_are_included(client) -> None:
    body = ask(tools=[SEARCH], include=["file_search_call.results"])
    results = (await client.post(PATH, json=body)).json()["output"][0]["results"]
    assert results[1] == {
        "file_id": "d2",
        "filename": "planets/venus.pdf",
        "score": 0.8,
        "attributes": {},
        "text": "Venus is hot.",
        "chunk_id": "c2",
    }


@pytest.mark.parametrize(
    "change, param",
    [
        ({"vector_store_ids": []}, "tools.0.vector_store_ids"),
        ({"vector_store_ids": [""]}, "tools.0.vector_store_ids.0"),
        ({"max_num_results": 51}, "tools.0.max_num_results"),
        ({"max_num_results": 0}, "tools.0.max_num_results"),
        ({"filters": {"type": "like", "key": "a", "value": "b"}}, "tools[0].filters.type"),
        ({"filters": []}, "tools.0.filters"),
        ({"ranking_options": {"ranker": "best"}}, "tools.0.ranking_options.ranker"),
        ({"ranking_options": {"score_threshold": 2}}, "tools.0.ranking_options.score_threshold"),
        ({"color": "red"}, "tools.0.color"),
    ],
)
async def test_a_malformed_tool_is_refused_with_the_place_at_fault(client, change: dict, param: str) -> None:
    assert error_of(await client.post(PATH, json=ask(tools=[SEARCH | change])), 400)["param"] == param


async def test_one_search_tool_is_enough(client) -> None:
    assert error_of(await client.post(PATH, json=ask(tools=[SEARCH, SEARCH])), 400)["param"] == "tools"


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_kept_as_it_was_replied_until_it_is_deleted(client, stream: bool) -> None:
    reply = await client.post(PATH, json=ask(FACTS, tools=[SEARCH], stream=stream))
    said = events_of(reply.text)[-1]["response"] if stream else reply.json()
    assert said["store"] is True
    one = f"{PATH}/{said['id']}"
    assert (await client.get(one)).json() == said
    assert (await client.delete(one)).json() == {"id": said["id"], "object": "response", "deleted": True}
    for gone in (await client.get(one), await client.delete(one), await client.get(f"{one}/input_items")):
        assert error_of(gone, 404)["message"] == f"No response found with id '{said['id']}'."


async def test_a_response_goes_on_from_another_without_its_instructions(client, rag: EchoRag) -> None:
    first = (await client.post(PATH, json=ask("one", instructions="be brief"))).json()
    second = (await client.post(PATH, json=ask("two", previous_response_id=first["id"]))).json()
    assert second["previous_response_id"] == first["id"]
    await client.delete(f"{PATH}/{first['id']}")
    await client.post(PATH, json=ask("three", previous_response_id=second["id"], instructions="be kind"))
    said = [Turn(role, text) for text in ("one", "two") for role in ("user", "assistant")]
    assert rag.questions[1].turns == (*said[:2], Turn("user", "two"))
    assert rag.questions[2].turns == (Turn("system", "be kind"), *said, Turn("user", "three"))


async def test_an_unknown_previous_response_is_refused(client) -> None:
    error = error_of(await client.post(PATH, json=ask(previous_response_id="resp_0")), 400)
    assert error["param"] == "previous_response_id"


async def test_a_response_that_must_not_be_kept_is_not(client) -> None:
    said = (await client.post(PATH, json=ask(store=False))).json()
    assert said["store"] is False
    error_of(await client.get(f"{PATH}/{said['id']}"), 404)
    error_of(await client.post(PATH, json=ask(previous_response_id=said["id"])), 400)


@pytest.mark.parametrize("config", [ServerConfig(keep_responses_days=0, drain_timeout_s=0), None])
async def test_a_server_that_keeps_no_responses_says_so(rag: EchoRag, config: ServerConfig | None) -> None:
    if config is None:
        rag.catalogue = None
    async with open_app(rag, config) as client:
        said = (await client.post(PATH, json=ask())).json()
        assert said["store"] is False
        assert error_of(await client.post(PATH, json=ask(store=True)), 400)["param"] == "store"
        for path in (f"{PATH}/{said['id']}", f"{PATH}/{said['id']}/input_items"):
            error_of(await client.get(path), 404)
        error_of(await client.delete(f"{PATH}/{said['id']}"), 404)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_cannot_be_kept_is_an_answer_all_the_same(client, rag: EchoRag, stream: bool) -> None:
    with rag.catalogue.database.write() as connection:
        connection.execute("DROP TABLE responses")
    reply = await client.post(PATH, json=ask(stream=stream))
    said = events_of(reply.text)[-1]["response"] if stream else reply.json()
    assert (said["status"], said["store"]) == ("completed", False)


async def test_input_items_are_listed_in_pages(client) -> None:
    given = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "id": "msg_mine"},
        {"role": "user", "content": "three"},
    ]
    said = (await client.post(PATH, json=ask(given))).json()
    path = f"{PATH}/{said['id']}/input_items"
    listed = (await client.get(path, params={"order": "asc"})).json()
    texts = [item["content"][0]["text"] for item in listed["data"]]
    ids = [item["id"] for item in listed["data"]]
    assert (texts, len(set(ids)), ids[1]) == (["one", "two", "three"], 3, "msg_mine")
    assert [item["content"][0]["type"] for item in listed["data"]] == ["input_text", "output_text", "input_text"]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (ids[0], ids[2], False)
    page = (await client.get(path, params={"limit": 1})).json()
    assert ([item["id"] for item in page["data"]], page["has_more"]) == ([ids[2]], True)
    page = (await client.get(path, params={"limit": 2, "after": ids[2]})).json()
    assert ([item["id"] for item in page["data"]], page["has_more"]) == ([ids[1], ids[0]], False)
    page = (await client.get(path, params={"order": "asc", "before": ids[1]})).json()
    assert [item["id"] for item in page["data"]] == [ids[0]]
    assert error_of(await client.get(path, params={"limit": 0}), 400)["param"] == "limit"


def test_a_kept_response_is_its_owners_alone(rag: EchoRag) -> None:
    stored = StoredResponses(rag.catalogue, keep_days=1)
    stored.add("resp_1", "alice", "{}")
    for other in ("", "bob"):
        for refused in (stored.body, stored.delete):
            with pytest.raises(NotFound, match="No response found with id 'resp_1'"):
                refused("resp_1", other)
    assert stored.body("resp_1", "alice") == "{}"
    stored.delete("resp_1", "alice")
    with pytest.raises(NotFound):
        stored.body("resp_1", "alice")


def test_a_response_is_forgotten_when_its_days_are_over(rag: EchoRag) -> None:
    database = rag.catalogue.database
    StoredResponses(rag.catalogue, keep_days=2).add("resp_old", "", "{}")
    with database.write() as connection:
        connection.execute("UPDATE responses SET created_at = created_at - 86400 - 60")
    assert StoredResponses(rag.catalogue, keep_days=2).body("resp_old", "") == "{}"
    shorter = StoredResponses(rag.catalogue, keep_days=1)
    with pytest.raises(NotFound):
        shorter.body("resp_old", "")
    shorter.add("resp_new", "", "{}")  # clears up
    with database.read() as connection:
        assert connection.execute("SELECT id FROM responses").fetchall() == [("resp_new",)]


# -- the official client -----------------------------------------------------------------------------------------------


@pytest.fixture
def official(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_client_reads_a_response_and_goes_on_from_it(official: openai.OpenAI, rag: EchoRag) -> None:
    include = ["file_search_call.results"]
    response = official.responses.create(model=MODEL, input=FACTS, tools=[SEARCH], include=include)
    assert (response.output_text, response.status) == (FACTS, "completed")
    search, message = response.output
    assert (search.queries, search.results[0].filename) == ([FACTS], "planets/mars.md")
    assert [a.file_id for a in message.content[0].annotations] == ["d1", "d2"]
    assert (response.usage.input_tokens, response.usage.input_tokens_details.cached_tokens) == (20, 7)
    assert response.usage.fusionrag["recomputed_tokens"] == 2
    more = official.responses.create(model=MODEL, input="more", previous_response_id=response.id)
    assert more.previous_response_id == response.id
    assert official.responses.retrieve(response.id).to_dict() == response.to_dict()
    assert [item.content[0].text for item in official.responses.input_items.list(response.id)] == [FACTS]
    assert official.responses.delete(response.id) is None
    with pytest.raises(openai.NotFoundError):
        official.responses.retrieve(response.id)


def test_the_clients_stream_ends_with_the_whole_response(official: openai.OpenAI) -> None:
    with official.responses.stream(model=MODEL, input=FACTS, tools=[SEARCH]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert deltas[-1].snapshot == final.output_text == FACTS
    added = [e.annotation.to_dict() for e in events if e.type == "response.output_text.annotation.added"]
    assert added == [annotation.to_dict() for annotation in final.output[1].content[0].annotations]
    assert final.usage.total_tokens == 26


def test_what_the_client_got_can_be_sent_back(official: openai.OpenAI, rag: EchoRag) -> None:
    first = official.responses.create(model=MODEL, input="one", tools=[SEARCH])
    history = [{"role": "user", "content": "one"}, *first.output, {"role": "user", "content": "two"}]
    assert official.responses.create(model=MODEL, input=history).output_text == "two"
    assert rag.questions[1].turns == (Turn("user", "one"), Turn("assistant", "one"), Turn("user", "two"))


def test_a_failed_stream_is_told_to_the_client(official: openai.OpenAI) -> None:
    events = list(official.responses.create(model=MODEL, input="a !error", stream=True))
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1].response.status == "failed"


async def test_the_async_client_reads_and_streams(live: LiveServer) -> None:
    async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        response = await client.responses.create(model=MODEL, input=FACTS, tools=[SEARCH])
        assert response.output_text == FACTS
        async with client.responses.stream(model=MODEL, input=FACTS, tools=[SEARCH]) as stream:
            text = "".join([e.delta async for e in stream if e.type == "response.output_text.delta"])
            assert (await stream.get_final_response()).output_text == text == FACTS


# -- with real vector stores -------------------------------------------------------------------------------------------


@dataclass
class FindingRag(EchoRag):
    """Echoes the question, and finds passages in real collections."""

    retriever: Retriever | None = None

    def prepare(self, question: Question, request_id: str) -> Prepared:
        prepared = super().prepare(replace(question, collections=()), request_id)
        hits = []
        for name in question.collections:
            self.catalogue.use_collection(name, question.owner)
            hits += self.retriever.search(name, question.turns[-1].content, self.search, question.filter)
        sources = [
            Source(i, h.chunk.chunk_id, h.chunk.document_id, h.chunk.title, h.source, h.chunk.text, h.score)
            for i, h in enumerate(hits, 1)
        ]
        return replace(prepared, sources=tuple(sources))


@pytest.mark.parametrize("stream", [False, True])
def test_an_uploaded_file_is_cited_by_its_id_and_shown_with_its_attributes(tmp_path: Path, stream: bool) -> None:
    texts = {"mars.md": b"# Mars\n\nMars is red.\n", "data.jsonl": b'{"title": "Venus", "text": "Venus is hot."}\n'}
    with open_live(tmp_path) as opened:
        rag = FindingRag(catalogue=opened.catalogue, retriever=opened.live.retriever)
        with (
            serving(rag, ServerConfig(drain_timeout_s=0), live=opened.live) as live,
            openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client,
        ):
            store = client.vector_stores.create(name="planets", expires_after={"anchor": "last_active_at", "days": 1})
            ids = {}
            for name, text in texts.items():
                ids[name] = client.files.create(file=(name, text), purpose="assistants").id
                attached = client.vector_stores.files.create_and_poll(
                    ids[name], vector_store_id=store.id, attributes={"kind": name[:4]}, poll_interval_ms=50
                )
                assert attached.status == "completed"
            tool = {"type": "file_search", "vector_store_ids": [store.id]}
            asked = {"model": MODEL, "input": "Mars is red. Venus is hot.", "include": ["file_search_call.results"]}
            if stream:
                with client.responses.stream(**asked, tools=[tool]) as events:
                    response = [*events] and events.get_final_response()
            else:
                response = client.responses.create(**asked, tools=[tool])
            search, message = response.output
            cited = [(a.file_id, a.filename) for a in message.content[0].annotations]
            assert cited == [(ids[name], name) for name in texts]
            shown = {(r.file_id, r.filename, r.attributes["kind"]) for r in search.results}
            assert shown == {(ids[name], name, name[:4]) for name in texts}
            only = tool | {"filters": {"type": "eq", "key": "kind", "value": "data"}}
            filtered = client.responses.create(**asked, tools=[only])
            assert [r.filename for r in filtered.output[0].results] == ["data.jsonl"]
            with opened.catalogue.database.write() as connection:
                connection.execute("UPDATE collections SET last_active_at = last_active_at - 86400")
            with pytest.raises(openai.BadRequestError, match="has expired") as expired:
                client.responses.create(**asked, tools=[tool])
            assert expired.value.param == "tools"
