"""What operators see of a request: metrics and one log line. What they must not see: what was asked."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fusionrag.types import KVSource
from server.access_log import RequestRecord
from server.config import ServerConfig
from tests.server.echo_rag import CHUNKS, STATS, EchoEngine, EchoRag, chat, open_app

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


async def samples_of(client) -> dict[tuple[str, ...], float]:
    """(name, label values…) -> value of all that /metrics says."""
    reply = await client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(reply.text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


async def test_an_answer_is_counted_once_in_every_metric(client) -> None:
    await client.post(CHAT, json=chat("a b c"))
    await client.post(CHAT, json=chat("a b c", stream=True))
    await client.post(CHAT, json=chat("a b c", max_tokens=1))
    samples = await samples_of(client)
    assert samples["fusionrag_time_to_first_token_seconds_count",] == 3
    assert samples["fusionrag_time_to_first_token_seconds_bucket", "2560.0"] == 3
    assert samples["fusionrag_phase_seconds_count", "probe"] == 3
    assert samples["fusionrag_phase_seconds_sum", "probe"] == pytest.approx(3 * 0.005)
    kinds = ("reused", "recomputed", "computed", "generated")
    assert [samples["fusionrag_tokens_total", kind] for kind in kinds] == [21, 6, 33, 7]
    assert [samples["fusionrag_chunks_total", s] for s in ("host", "disk", "computed")] == [3, 3, 3]
    assert samples["fusionrag_requests_by_way_total", "reuse"] == 3
    assert samples["fusionrag_requests_total", "stop"] == 2
    assert samples["fusionrag_requests_total", "length"] == 1


async def test_other_routes_are_not_counted_as_requests(client) -> None:
    await client.get("/health")
    await client.get("/v1/models")
    assert not any(key[0] == "fusionrag_requests_total" for key in await samples_of(client))


async def test_requests_are_counted_by_how_they_ended() -> None:
    rag = EchoRag(EchoEngine(max_queue=1, delay_s=0.02))
    async with open_app(rag, ServerConfig(request_timeout_s=0.4, drain_timeout_s=0)) as client:
        for text in ("!error", "a !error", "a", "a " * 60, "word " * 65):
            await client.post(CHAT, json=chat(text, stream=text == "a !error"))
        rag.engine.max_queue = 0
        await client.post(CHAT, json=chat("a"))
        await client.post(CHAT, json=chat("a", n=2))
        samples = await samples_of(client)
    ended = {key[1]: value for key, value in samples.items() if key[0] == "fusionrag_requests_total"}
    assert ended == {"error": 2, "stop": 1, "cancelled": 1, "rejected": 3}


@pytest.mark.parametrize(
    "status, finish_reason, outcome",
    [
        (200, "stop", "stop"),
        (200, None, "error"),
        (400, None, "rejected"),
        (499, None, "cancelled"),
        (503, None, "error"),
    ],
)
def test_every_request_has_an_outcome(status: int, finish_reason: str | None, outcome: str) -> None:
    assert RequestRecord("id", status=status, finish_reason=finish_reason).outcome == outcome


async def test_the_gauges_show_the_engines_load(rag: EchoRag) -> None:
    async with open_app(rag) as client:
        samples = await samples_of(client)
    names = ("requests_running", "requests_waiting", "arena_tokens", "arena_used_tokens")
    assert [samples[f"fusionrag_{name}",] for name in names] == [0, 0, 1024, 0]


def line_of(caplog) -> dict:
    (record,) = [r for r in caplog.records if r.name == "fusionrag.request"]
    return json.loads(record.getMessage())


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_one_line_of_json_without_a_word_of_it(client, caplog, stream: bool) -> None:
    caplog.set_level(logging.INFO)
    reply = await client.post(CHAT, json=chat("zanzibar !", collection="planets", user="alice", stream=stream))
    line = line_of(caplog)
    assert line["request_id"] == reply.headers["x-request-id"]
    assert 0 < line.pop("ttft_server_ms") <= line.pop("total_ms")
    assert line == {
        "request_id": reply.headers["x-request-id"],
        "route": CHAT,
        "status": 200,
        "collection": "planets",
        "finish_reason": "stop",
        "ttft_ms": 36.0,
        "way": "reuse",
        "predicted_ms": None,
        "predicted_full_ms": None,
        "phases_ms": {
            "queue": 1,
            "retrieve": 2,
            "load": 3,
            "reposition": 4,
            "probe": 5,
            "select": 6,
            "recompute": 7,
            "sample": 8,
        },
        "kv_arrival_ms": 0,
        "prompt_tokens": 20,
        "completion_tokens": 2,
        "reused_tokens": 7,
        "recomputed_tokens": 2,
        "computed_tokens": 11,
    }
    assert not any(word in caplog.text for word in ("zanzibar", "alice", "Mars"))


async def test_the_way_that_was_chosen_is_counted_and_logged_with_its_prediction(rag: EchoRag, caplog) -> None:
    caplog.set_level(logging.INFO)
    rag.engine.stats = replace(STATS, way="full", predicted_ms=30.12345, predicted_full_ms=40.5, arrival_ms=1.5)
    async with open_app(rag) as client:
        await client.post(CHAT, json=chat("a"))
        line = line_of(caplog)
        samples = await samples_of(client)
    found = [line[name] for name in ("way", "predicted_ms", "predicted_full_ms", "kv_arrival_ms")]
    assert found == ["full", 30.123, 40.5, 1.5]
    assert samples["fusionrag_requests_by_way_total", "full"] == 1


async def test_kv_that_was_on_the_device_is_counted_as_that(rag: EchoRag) -> None:
    rag.engine.stats = replace(STATS, chunks=(replace(CHUNKS[0], source=KVSource.DEVICE), *CHUNKS[1:]))
    async with open_app(rag) as client:
        await client.post(CHAT, json=chat("a"))
        samples = await samples_of(client)
    assert [samples["fusionrag_chunks_total", s] for s in ("device", "disk", "computed")] == [1, 1, 1]


async def test_a_refused_request_is_logged_too(client, caplog) -> None:
    caplog.set_level(logging.INFO)
    await client.post(CHAT, json=chat(n=2))
    line = line_of(caplog)
    assert (line["route"], line["status"], line["ttft_server_ms"]) == (CHAT, 400, None)


async def test_a_path_that_is_no_route_is_not_logged(client, caplog) -> None:
    """Paths can carry what users typed; only the patterns of routes are logged."""
    caplog.set_level(logging.INFO)
    await client.get("/search/zanzibar")
    assert (line_of(caplog)["route"], line_of(caplog)["status"]) == ("unknown", 404)


async def test_polling_is_quiet(client, caplog) -> None:
    caplog.set_level(logging.INFO)
    await client.get("/health")
    await client.get("/metrics")
    assert [r for r in caplog.records if r.name == "fusionrag.request"] == []


async def test_the_time_to_first_token_ends_at_the_first_content_not_at_the_last(rag: EchoRag, caplog) -> None:
    caplog.set_level(logging.INFO)
    rag.engine.delay_s = 0.02
    async with open_app(rag) as client:
        await client.post(CHAT, json=chat("~ ~ first b c d e f", stream=True))
    line = line_of(caplog)
    assert 3 * 20 <= line["ttft_server_ms"] < line["total_ms"] - 4 * 20
