"""/v1/chat/completions and /v1/completions. The work is done in `answer`, the bytes in `sse`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response

from fusionrag.rag import Question
from server import sse
from server.access_log import COMPLETION_ROUTES
from server.answer import Answer
from server.api.common import STREAMED, json_response, timing_headers
from server.citations import Citation, CitationStyle, CitedPiece
from server.connection import ClientConnection
from server.protocol.completions import ChatCompletionRequest, CompletionRequest, GenerationRequest
from server.replies.completions import ChatCompletion, ChatWording, TextCompletion, TextWording
from server.services import Services, owner_of, record_of, timeout_of


async def _events(
    answer: Answer, wording: ChatWording | TextWording, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """A streamed answer, event by event. What follows a `yield` runs once the transport has taken the event."""
    begun = False
    unsent: tuple[Citation, ...] = ()
    async with aclosing(answer.pieces()) as pieces:
        async for piece in pieces:
            if not piece.text:
                unsent = piece.citations
                continue
            yield sse.encode_event(wording.more(piece) if begun else wording.first(piece, answer))
            answer.record.mark_first_content()
            begun = True
    if not begun:
        yield sse.encode_event(wording.first(CitedPiece(""), answer))
    yield sse.encode_event(wording.last(unsent, answer))
    if include_usage:
        yield sse.encode_event(wording.usage(answer))
    yield sse.DONE


def add_routes(app: FastAPI, services: Services) -> None:
    routes = _Routes(services)
    chat, text, *_ = COMPLETION_ROUTES
    app.add_api_route(
        chat, routes.chat_completions, methods=["POST"], response_model=ChatCompletion, responses=STREAMED
    )
    app.add_api_route(text, routes.completions, methods=["POST"], response_model=TextCompletion, responses=STREAMED)


@dataclass(frozen=True)
class _Routes:
    services: Services

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answers the last message from the passages of a collection, or from those sent along."""
        self.services.check_model(body.model)
        rag = self.services.rag
        question = body.question(owner_of(request), self.services.config.default_collection, rag.reuse, rag.search)
        wording = ChatWording(f"chatcmpl-{record_of(request).request_id}", int(time.time()), body.model)
        return await self._answer(request, body, question, wording, body.citations or "annotations")

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continues a prompt."""
        self.services.check_model(body.model)
        wording = TextWording(f"cmpl-{record_of(request).request_id}", int(time.time()), body.model)
        return await self._answer(request, body, body.question(owner_of(request)), wording)

    async def _answer(
        self,
        request: Request,
        body: GenerationRequest,
        question: Question,
        wording: ChatWording | TextWording,
        citations: CitationStyle = "none",
    ) -> Response:
        record, timeout_s = record_of(request), timeout_of(request)
        record.collection = ",".join(question.collections) or None
        answer = Answer(question, wording.id, self.services.preparation, self.services.worker, record, citations)
        if body.stream:
            events = _events(answer, wording, body.include_usage)
            keep_alive_s = self.services.config.keep_alive_s
            return sse.EventStream(events, timeout_s, keep_alive_s, lambda: timing_headers(record.stats))
        async with ClientConnection(request.receive, timeout_s) as client:
            said = await client.result(answer.whole())
        return json_response(wording.whole(said, answer), timing_headers(record.stats))
