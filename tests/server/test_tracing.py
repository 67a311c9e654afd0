"""Spans of finished requests, read from the SDK's in-memory exporter; and the server where the library is absent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode

from server.tracing import Tracing, tracing
from tests.server.echo_rag import EchoRag, chat, open_app

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def client(rag: EchoRag, spans: InMemorySpanExporter) -> AsyncIterator[httpx.AsyncClient]:
    """The app, traced once more, to `spans`; a process has but one provider of its own."""
    # without a parent nothing is sampled, so a span shows that the parent was honoured
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(0.0)))
    provider.add_span_processor(SimpleSpanProcessor(spans))
    tracing = Tracing(provider)
    async with open_app(rag) as client:
        app = client._transport.app

        async def traced(scope, receive, send) -> None:
            await app(scope, receive, send)
            tracing.observe(scope["state"]["record"], scope)

        client._transport.app = traced
        client.headers["traceparent"] = TRACEPARENT
        yield client


def request_span(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = [s for s in spans.get_finished_spans() if s.kind == SpanKind.SERVER]
    return span


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_one_span_with_what_it_took_and_not_a_word_of_it(client, spans, stream: bool) -> None:
    question = chat("zanzibar", collection="planets", user="alice", stream=stream)
    reply = await client.post(CHAT + "?secret=kilimanjaro", json=question)
    span = request_span(spans)
    assert span.name == CHAT
    found = dict(span.attributes)
    assert 0 < found.pop("fusionrag.ttft_ms") < (span.end_time - span.start_time) / 1e6
    assert found.pop("fusionrag.request_id") == reply.headers["x-request-id"]
    assert len(found.pop("fusionrag.collection_hash")) == 16
    assert found == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "fusionrag.finish_reason": "stop",
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 1,
        "fusionrag.way": "reuse",
        "fusionrag.reused_tokens": 7,
        "fusionrag.recomputed_tokens": 2,
        "fusionrag.computed_tokens": 11,
    }
    written = "".join(s.to_json() for s in spans.get_finished_spans())
    assert not any(word in written for word in ("zanzibar", "kilimanjaro", "alice", "Mars", "planets"))


async def test_the_phases_are_children_end_to_end_in_the_order_in_which_they_happen(client, spans) -> None:
    await client.post(CHAT, json=chat())
    span = request_span(spans)
    children = sorted((s for s in spans.get_finished_spans() if s is not span), key=lambda s: s.start_time)
    assert all(s.parent.span_id == span.context.span_id for s in children)
    lengths = [(s.name, (s.end_time - s.start_time) / 1e6) for s in children]
    names = ["retrieve", "queue", "load", "reposition", "probe", "select", "recompute", "sample"]
    assert lengths == [(name, ms) for name, ms in zip(names, (2, 1, 3, 4, 5, 6, 7, 8), strict=True)]
    assert children[0].start_time == span.start_time
    assert all(a.end_time == b.start_time for a, b in pairwise(children))
    (first_token,) = span.events
    assert first_token.name == "first_token"
    assert span.start_time < first_token.timestamp <= span.end_time


async def test_the_span_continues_the_clients_trace(client, spans) -> None:
    await client.get("/v1/models")
    span = request_span(spans)
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE_ID, PARENT_ID)
    assert "fusionrag.finish_reason" not in span.attributes


@pytest.mark.parametrize(
    "traceparent", ["", "zanzibar", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", TRACEPARENT[:-2] + "00"]
)
async def test_a_trace_that_is_malformed_or_not_sampled_is_not_continued(client, spans, traceparent: str) -> None:
    reply = await client.get("/v1/models", headers={"traceparent": traceparent})
    assert reply.status_code == 200
    assert spans.get_finished_spans() == ()


async def test_failures_are_told_apart_from_refusals(client, spans, caplog) -> None:
    async def status_of(send) -> tuple[int, StatusCode]:
        spans.clear()
        await send
        span = request_span(spans)
        return span.attributes["http.response.status_code"], span.status.status_code

    assert await status_of(client.post(CHAT, json=chat(n=2))) == (400, StatusCode.UNSET)
    assert await status_of(client.post(CHAT, json=chat("!error"))) == (500, StatusCode.ERROR)
    assert "secret" not in "".join(s.to_json() for s in spans.get_finished_spans())


async def test_paths_and_methods_that_are_ours_alone_become_attributes(client, spans) -> None:
    """What clients make up can be text of theirs, and every new value costs a tracing backend."""
    await client.request("ZANZIBAR", "/zanzibar")
    span = request_span(spans)
    assert (span.name, span.attributes["http.request.method"]) == ("unknown", "_OTHER")
    assert "zanzibar" not in span.to_json().lower()


async def test_polling_leaves_no_spans(client, spans) -> None:
    for path in ("/health", "/ready", "/metrics"):
        await client.get(path)
    assert spans.get_finished_spans() == ()


PROCESS = """
import asyncio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.server.echo_rag import EchoRag, chat, open_app

spans = InMemorySpanExporter()
trace.set_tracer_provider(provider := TracerProvider())
provider.add_span_processor(SimpleSpanProcessor(spans))

async def ask():
    async with open_app(EchoRag()) as client:
        await client.get("/v1/models/zanzibar?secret=kilimanjaro")
        await client.post("/v1/chat/completions", json=chat("!error"))

asyncio.run(ask())
print("\\n".join(s.to_json(indent=None) for s in spans.get_finished_spans()))
"""


def test_the_spans_of_a_whole_process_are_ours_and_have_no_text_of_anybody() -> None:
    """FastAPI makes spans of its own, with the URL's path in them, unless told not to."""
    done = subprocess.run([sys.executable, "-c", PROCESS], cwd=ROOT, capture_output=True, text=True)
    names = [json.loads(line)["name"] for line in done.stdout.splitlines()]
    assert [name for name in names if name.startswith("/")] == ["/v1/models/{model:path}", CHAT], done.stderr
    assert not any(name.startswith("fastapi") for name in names)
    assert not any(word in done.stdout for word in ("zanzibar", "kilimanjaro", "secret"))


async def test_the_server_works_without_the_library(rag: EchoRag, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # what is imported of it from here on is not there
    assert tracing() is None
    async with open_app(rag) as client:
        assert (await client.post(CHAT, json=chat(), headers={"traceparent": TRACEPARENT})).status_code == 200
