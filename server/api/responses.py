"""/v1/responses. The work is done in `answer`, the bytes in `sse`.

A response is kept for `keep_responses_days`, with the conversation that led to it, unless the request says otherwise or
the server has no catalogue to keep it in; `store` in the reply says whether it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel

from fusionrag.errors import RequestError
from fusionrag.rag import Question, Turn
from index.errors import CollectionNotFound, FusionRAGError, InvalidValue, NotFound
from index.library_types import Attributes
from index.stored_responses import StoredResponses
from server import sse
from server.access_log import COMPLETION_ROUTES
from server.answer import Answer
from server.api.common import ERRORS, STREAMED, json_response, timing_headers
from server.citations import CitedPiece
from server.connection import ClientConnection
from server.errors import ErrorReply
from server.protocol.common import MAX_NAME
from server.protocol.responses import ChosenTool, InputMessage, ResponseRequest
from server.replies.response_events import Event, ResponseWording
from server.replies.responses import DeletedResponse, InputItem, InputItemList, InputText, OutputText, ResponseReply
from server.services import Services, owner_of, record_of, timeout_of

logger = logging.getLogger(__name__)
Include = Annotated[list[Literal["file_search_call.results"]] | None, Query()]
Cursor = Annotated[str | None, Query(max_length=MAX_NAME)]


class _Said(BaseModel):
    """A turn of a stored conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class _Kept(BaseModel):
    """What is kept of a response. `turns` is the whole conversation, its answer included; not the instructions."""

    response: ResponseReply
    input: list[InputItem]
    turns: list[_Said]


@dataclass(frozen=True)
class _Asked:
    """One request on its way to its answer."""

    body: ResponseRequest
    owner: str
    question: Question
    before: tuple[Turn, ...]  # the turns of the response it goes on from
    wording: ResponseWording
    answer: Answer


def add_routes(app: FastAPI, services: Services) -> None:
    catalogue, keep_days = services.rag.catalogue, services.config.keep_responses_days
    routes = _Routes(services, StoredResponses(catalogue, keep_days) if catalogue and keep_days else None)
    *_, path = COMPLETION_ROUTES
    one = f"{path}/{{response_id}}"
    app.add_api_route(path, routes.create, methods=["POST"], response_model=ResponseReply, responses=STREAMED)
    app.add_api_route(one, routes.get, response_model=ResponseReply, responses=ERRORS)
    app.add_api_route(one, routes.delete, methods=["DELETE"], response_model=DeletedResponse, responses=ERRORS)
    app.add_api_route(f"{one}/input_items", routes.input_items, response_model=InputItemList, responses=ERRORS)


@dataclass(frozen=True)
class _Routes:
    services: Services
    stored: StoredResponses | None

    async def create(self, body: ResponseRequest, request: Request) -> Response:
        """Answers the last message. With the tool file_search, from the vector stores: it is always used, once."""
        self.services.check_model(body.model)
        asked = await self._asked(body, request)
        record, timeout_s = record_of(request), timeout_of(request)
        if body.stream:
            return sse.EventStream(
                self._events(asked),
                timeout_s,
                self.services.config.keep_alive_s,
                lambda: timing_headers(record.stats),
                lambda error: self._failure(asked, error),
            )
        async with ClientConnection(request.receive, timeout_s) as client:
            reply = await client.result(self._whole(asked))
        return json_response(reply, timing_headers(record.stats))

    async def get(self, response_id: str, request: Request, include: Include = None) -> Response:
        """A stored response, as it was replied; results are there if they were included then."""
        del include
        return json_response((await self._kept(response_id, owner_of(request))).response)

    async def delete(self, response_id: str, request: Request) -> Response:
        """Forgets a response. Those that went on from it keep the conversation they were made in."""
        if self.stored is None:
            raise NotFound("response", response_id)
        await self.services.preparation.run(self.stored.delete, response_id, owner_of(request))
        return json_response(DeletedResponse(id=response_id))

    async def input_items(
        self,
        response_id: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Cursor = None,
        before: Cursor = None,
        include: Include = None,
    ) -> Response:
        """The messages that a response was asked with; those of responses before it are not repeated."""
        del include
        items = (await self._kept(response_id, owner_of(request))).input
        items = items[::-1] if order == "desc" else items
        ids = [item.id for item in items]
        first = ids.index(after) + 1 if after in ids else 0
        last = ids.index(before) if before in ids else len(ids)
        page = items[first:last][:limit]
        ends = (page[0].id, page[-1].id) if page else (None, None)
        has_more = last - first > limit
        return json_response(InputItemList(data=page, first_id=ends[0], last_id=ends[1], has_more=has_more))

    async def _asked(self, body: ResponseRequest, request: Request) -> _Asked:
        services, record, owner = self.services, record_of(request), owner_of(request)
        if body.store and self.stored is None:
            raise RequestError("this server keeps no responses; leave store out, or send false", "store")
        before = await self._turns_of(body.previous_response_id, owner) if body.previous_response_id else ()
        question = body.question(owner, before, services.rag.reuse, services.rag.search)
        record.collection = ",".join(question.collections) or None
        begun = ResponseReply(
            id=f"resp_{record.request_id}",
            created_at=int(time.time()),
            model=body.model,
            instructions=body.instructions,
            max_output_tokens=question.sampling.max_tokens,
            temperature=question.sampling.temperature,
            top_p=question.sampling.top_p,
            tools=[tool.model_dump() for tool in body.tools or ()],
            tool_choice=_chosen(body),
            previous_response_id=body.previous_response_id,
            store=self.stored is not None and body.store is not False,
            metadata=body.metadata or {},
            user=body.user,
        )
        searched = services.rag.search_text(question.turns) if question.collections else None
        wording = ResponseWording(begun, searched, body.includes_results)
        answer = Answer(question, begun.id, services.preparation, services.worker, record)
        return _Asked(body, owner, question, before, wording, answer)

    async def _whole(self, asked: _Asked) -> ResponseReply:
        with _in_words_of_tools():
            said = await asked.answer.whole()
        asked.wording.attributes = await self._attributes(asked)
        return await self._keep(asked, asked.wording.whole(said, asked.answer, int(time.time())), said)

    async def _events(self, asked: _Asked) -> AsyncGenerator[bytes, None]:
        """A streamed response, event by event. What follows a `yield` runs once the transport has taken the event."""
        wording, answer, begun = asked.wording, asked.answer, False
        with _in_words_of_tools():
            async with aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    if not begun:
                        begun, wording.attributes = True, await self._attributes(asked)
                        for event in wording.first(answer.sources):
                            yield _encoded(event)
                    for event in wording.more(piece):
                        yield _encoded(event)
                        answer.record.mark_first_content()
        for event in () if begun else wording.first(answer.sources):
            yield _encoded(event)
        said = wording.said()
        reply = wording.whole(said, answer, int(time.time()))
        for event in wording.message_done(reply):
            yield _encoded(event)
        yield _encoded(wording.last(await self._keep(asked, reply, said)))

    async def _attributes(self, asked: _Asked) -> dict[str, Attributes]:
        """The attributes of the documents found, by their ids; only where results are shown."""
        live, found = self.services.live, {source.document_id for source in asked.answer.sources}
        attributes: dict[str, Attributes] = {}
        if live is not None and found and asked.body.includes_results:
            for store in reversed(asked.question.collections):  # the first that has a document counts
                cited = await self.services.preparation.run(live.library.vector_stores.cited, store, found)
                attributes |= {document_id: file.attributes for document_id, file in cited.items()}
        return attributes

    @staticmethod
    def _failure(asked: _Asked, error: ErrorReply) -> bytes:
        return b"".join(_encoded(event) for event in asked.wording.failed(error))

    async def _keep(self, asked: _Asked, reply: ResponseReply, said: CitedPiece) -> ResponseReply:
        """Stores the response, before its client hears of its end. One that cannot be kept is answered all the same."""
        if self.stored is None or not reply.store:
            return reply
        messages = asked.body.input
        turns = (*asked.before, *(message.turn for message in messages), Turn("assistant", said.text))
        kept = _Kept(
            response=reply,
            input=[_input_item(reply.id, i, message) for i, message in enumerate(messages)],
            turns=[_Said(role=turn.role, content=turn.content) for turn in turns],
        )
        try:
            await self.services.preparation.run(self.stored.add, reply.id, asked.owner, kept.model_dump_json())
        except FusionRAGError as error:
            logger.warning("response %s could not be kept: %s", reply.id, error)
            return reply.model_copy(update={"store": False})
        return reply

    async def _kept(self, response_id: str, owner: str) -> _Kept:
        """Raises NotFound."""
        if self.stored is None:
            raise NotFound("response", response_id)
        return _Kept.model_validate_json(await self.services.preparation.run(self.stored.body, response_id, owner))

    async def _turns_of(self, response_id: str, owner: str) -> tuple[Turn, ...]:
        """The conversation that ended with this response. Raises RequestError."""
        try:
            kept = await self._kept(response_id, owner)
        except NotFound as error:
            message = f"Previous response with id {response_id!r} not found."
            raise RequestError(message, "previous_response_id") from error
        return tuple(Turn(said.role, said.content) for said in kept.turns)


@contextmanager
def _in_words_of_tools() -> Iterator[None]:
    """Collections are vector stores here, and what is wrong with them is wrong with the tool that names them."""
    try:
        yield
    except CollectionNotFound as error:
        raise NotFound("vector store", error.name) from error
    except InvalidValue as error:
        if error.field != "collection":
            raise
        raise RequestError(str(error).partition(": ")[2], "tools") from error


def _encoded(event: Event) -> bytes:
    return sse.encode_event(event, event.type)


def _chosen(body: ResponseRequest) -> str | dict[str, str]:
    return body.tool_choice.model_dump() if isinstance(body.tool_choice, ChosenTool) else body.tool_choice or "auto"


def _input_item(response_id: str, number: int, message: InputMessage) -> InputItem:
    item_id = message.id or f"{response_id.replace('resp_', 'msg_')}_{number}"
    text = OutputText if message.role == "assistant" else InputText
    return InputItem(id=item_id, role=message.role, content=[text(text=message.content)])
