"""The server against its own OpenAPI document: every route, with requests that the document allows and that it forbids.

schemathesis makes the requests and judges the replies: no 500, no status, content type or body that the document does
not announce, and nothing accepted that it forbids. Routes are taken from the document, so new ones are tested too.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from server.config import ServerConfig
from tests.server.echo_rag import MODEL, EchoEmbedder, EchoRag, LiveServer, serving
from tests.server.live_collections import open_live
from tests.server.things import Things, make_things

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
MAX_EXAMPLES = 5  # of each route, allowed ones and forbidden ones
QUIETLY = settings(
    max_examples=MAX_EXAMPLES,
    phases=[Phase.generate],  # a reply's failure is told as it is, without shrinking
    suppress_health_check=list(HealthCheck),
    deadline=None,
    database=None,
    derandomize=True,
)


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> Iterator[LiveServer]:
    with open_live(tmp_path_factory.mktemp("data")) as opened:
        rag = EchoRag(catalogue=opened.catalogue, embedder=EchoEmbedder())
        with serving(rag, ServerConfig(drain_timeout_s=0, max_file_bytes=1 << 16), live=opened.live) as live:
            yield live


@dataclass(frozen=True)
class Known:
    """One thing of each kind that exists."""

    things: Things

    def use(self, case: Case) -> None:
        """Puts known ids in most cases: with invented ones, nothing but the look-up of a route would run."""
        die = zlib.crc32(repr(case.body).encode() + repr(case.path_parameters).encode()) % 4
        if die == 0:
            return
        for name in case.path_parameters:
            case.path_parameters[name] = getattr(self.things, name, MODEL)
        if case.meta.generation.mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
            self._complete(case, stream=die == 1)

    def _complete(self, case: Case, stream: bool) -> None:
        """What the document cannot say: which models there are, and that the last message is the user's."""
        if "model" in case.body:
            embeds = case.path.endswith("/embeddings")
            case.body["model"] = EchoEmbedder.name if embeds else MODEL
            if not embeds:
                case.body["stream"] = stream
                case.body.pop("stream_options", None)
                case.body.pop("previous_response_id", None)
        if "messages" in case.body:
            case.body["messages"][-1] = {"role": "user", "content": "the red planet"}
            case.body.pop("documents", None)
            case.body["collection"] = "planets"
        if "file_id" in case.body:
            case.body["file_id"] = self.things.file_id
        if "file_ids" in case.body or case.path.endswith("/file_batches"):
            case.body["file_ids"] = [self.things.file_id]
            case.body.pop("files", None)


@pytest.mark.slow
def test_every_route_keeps_to_the_document(live: LiveServer, subtests) -> None:
    operations = [
        found.ok() for found in schemathesis.openapi.from_url(live.url + "/openapi.json").get_all_operations()
    ]
    assert {"/v1/chat/completions", "/v1/files", "/health"} <= {operation.path for operation in operations}
    for operation in operations:
        has_something_to_forbid = operation.body or operation.query
        modes = GenerationMode if has_something_to_forbid else [GenerationMode.POSITIVE]
        with httpx.Client(base_url=live.url) as client:
            known = Known(make_things(client))
        for mode in modes:
            with subtests.test(operation.label, mode=mode.value), requests.Session() as session:
                keep_to_the_document(operation, mode, known, session)
    assert httpx.get(live.url + "/ready").status_code == 200


def keep_to_the_document(operation, mode: GenerationMode, known: Known, session: requests.Session) -> None:
    @QUIETLY
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        known.use(case)
        case.call_and_validate(checks=CHECKS, session=session)

    check()


def test_the_document_lists_every_route_but_itself_and_the_page(live: LiveServer) -> None:
    app = live.server.config.app
    served = {(method, route.path.replace(":path", "")) for route in app.routes for method in route.methods}
    paths = httpx.get(live.url + "/openapi.json").json()["paths"]
    listed = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    hidden = {path for _, path in served - listed}
    assert hidden == {"/", "/assets/{name}", "/openapi.json"}
