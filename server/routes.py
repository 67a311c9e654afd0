"""The routes: what each takes and gives. The work is done in `answer`, the wording in `replies`, the bytes in `sse`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from fusionrag.rag import Question, Rag
from server import metrics, sse
from server.access_log import COMPLETION_ROUTES, RequestRecord
from server.answer import Answer, Preparation
from server.config import ServerConfig
from server.connection import ClientConnection
from server.errors import ErrorBody, ModelUnknown, ServerError, reply_for
from server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from server.replies import ChatCompletion, ChatWording, ModelCard, ModelList, TextCompletion, TextWording
from server.worker import Worker

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def _json(reply: BaseModel) -> Response:
    return Response(reply.model_dump_json(), media_type="application/json")


async def _events(
    answer: Answer, wording: ChatWording | TextWording, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """A streamed answer, event by event. What follows a `yield` runs once the transport has taken the event."""
    begun = False
    async with aclosing(answer.pieces()) as pieces:
        async for piece in pieces:
            yield sse.encode_event(wording.more(piece) if begun else wording.first(piece, answer.sources))
            answer.record.mark_first_content()
            begun = True
    if not begun:
        yield sse.encode_event(wording.first("", answer.sources))
    yield sse.encode_event(wording.last(answer.finish_reason))
    if include_usage:
        yield sse.encode_event(wording.usage(answer.stats))
    yield sse.DONE


@dataclass(frozen=True)
class Routes:
    """The endpoints of one server."""

    rag: Rag
    worker: Worker
    preparation: Preparation
    metrics: metrics.Metrics
    config: ServerConfig
    created: int = field(default_factory=lambda: int(time.time()))

    def add_to(self, app: FastAPI) -> None:
        post = partial(app.add_api_route, methods=["POST"], responses=ERRORS)
        chat, text = COMPLETION_ROUTES
        post(chat, self.chat_completions, response_model=ChatCompletion)
        post(text, self.completions, response_model=TextCompletion)
        app.add_api_route("/v1/models", self.list_models, response_model=ModelList)
        # a model's name may be a path
        app.add_api_route("/v1/models/{model:path}", self.get_model, response_model=ModelCard, responses=ERRORS)
        app.add_api_route("/health", self.health, responses=ERRORS)
        app.add_api_route("/metrics", self.read_metrics)

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answers the last message from the passages of a collection, or from those sent along."""
        record = self._begin(request, body)
        question = body.question(self.config.default_collection, self.rag.reuse)
        wording = ChatWording(f"chatcmpl-{record.request_id}", int(time.time()), body.model)
        return await self._answer(request, body, question, wording)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continues a prompt."""
        record = self._begin(request, body)
        question = body.question()
        wording = TextWording(f"cmpl-{record.request_id}", int(time.time()), body.model)
        return await self._answer(request, body, question, wording)

    async def list_models(self) -> Response:
        return _json(ModelList(data=[self._card()]))

    async def get_model(self, model: str) -> Response:
        self._check_model(model)
        return _json(self._card())

    async def health(self, request: Request) -> Response:
        """200 while requests are served; 503 with the reason otherwise. Needs no key, so it tells no more."""
        try:
            self.worker.check_ready()
        except ServerError as error:
            return reply_for(error, request.state.record.request_id).response()
        return Response('{"status":"ready"}', media_type="application/json")

    async def read_metrics(self) -> Response:
        return Response(self.metrics.exposition(), headers={"Content-Type": metrics.CONTENT_TYPE})

    def _card(self) -> ModelCard:
        return ModelCard(id=self.rag.model_name, created=self.created, max_model_len=self.rag.max_model_len)

    def _check_model(self, name: str) -> None:
        if name != self.rag.model_name:
            raise ModelUnknown(f"no model {name!r} here; this server has {self.rag.model_name!r}")

    def _begin(self, request: Request, body: GenerationRequest) -> RequestRecord:
        record: RequestRecord = request.state.record
        self._check_model(body.model)
        return record

    async def _answer(
        self, request: Request, body: GenerationRequest, question: Question, wording: ChatWording | TextWording
    ) -> Response:
        record: RequestRecord = request.state.record
        record.collection = question.collection
        answer = Answer(question, wording.id, self.preparation, self.worker, record)
        if body.stream:
            events = _events(answer, wording, body.include_usage)
            return sse.EventStream(events, self.config.request_timeout_s, self.config.keep_alive_s)
        async with ClientConnection(request.receive, self.config.request_timeout_s) as client:
            text = await client.result(answer.text())
        return _json(wording.whole(text, answer.finish_reason, answer.stats, answer.sources))
