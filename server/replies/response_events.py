"""How a response is spelled, whole or event by event. Knows nothing of HTTP, of SSE or of how answers come about.

Invariant: the events of a stream, put together by the official client, are the object that is sent whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from fusionrag.rag import Source
from index.library_types import Attributes
from server.answer import Answer
from server.citations import Citation, CitedPiece
from server.errors import ErrorReply
from server.replies.citations import FileCitation, file_citation
from server.replies.responses import (
    FileSearchCall,
    IncompleteDetails,
    OutputItem,
    OutputMessage,
    OutputText,
    ResponseFailure,
    ResponseReply,
    Status,
    response_usage,
    result_reply,
)


class Event(BaseModel):
    """One event of a stream; what else it holds depends on its type."""

    type: str
    sequence_number: int


class LifecycleEvent(Event):
    response: ResponseReply


class ItemEvent(Event):
    output_index: int
    item: OutputItem


class SearchEvent(Event):
    output_index: int
    item_id: str


class ContentEvent(Event):
    output_index: int
    item_id: str
    content_index: Literal[0] = 0


class PartEvent(ContentEvent):
    part: OutputText


class DeltaEvent(ContentEvent):
    delta: str
    logprobs: list[None] = []


class AnnotationEvent(ContentEvent):
    annotation_index: int
    annotation: FileCitation


class TextDoneEvent(ContentEvent):
    text: str
    logprobs: list[None] = []


class ErrorEvent(Event):
    code: str | None
    message: str
    param: str | None


@dataclass
class ResponseWording:
    """Spells one response, whole or event by event. `begun` is the response without an answer.

    question: what the vector stores are searched for; None where they are not. attributes: of the documents found.
    """

    begun: ResponseReply
    question: str | None
    includes_results: bool
    attributes: Mapping[str, Attributes] = field(default_factory=dict)
    _num_events: int = 0
    _text: list[str] = field(default_factory=list)
    _citations: list[Citation] = field(default_factory=list)

    @property
    def _message_id(self) -> str:
        return self.begun.id.replace("resp_", "msg_")

    @property
    def _message_index(self) -> int:
        return 0 if self.question is None else 1

    def whole(self, said: CitedPiece, answer: Answer, now: int) -> ResponseReply:
        """The finished response. now: Unix time."""
        is_complete = answer.finish_reason != "length"
        status: Status = "completed" if is_complete else "incomplete"
        output: list[OutputItem] = [*self._searches(answer.sources), self._message(said, status)]
        update = {
            "status": status,
            "completed_at": now if is_complete else None,
            "incomplete_details": None if is_complete else IncompleteDetails(),
            "output": output,
            "usage": response_usage(answer),
        }
        return self.begun.model_copy(update=update)

    def said(self) -> CitedPiece:
        """What has been streamed so far."""
        return CitedPiece("".join(self._text), tuple(self._citations))

    # -- events, in the order of a stream ------------------------------------------------------------------------------

    def first(self, sources: tuple[Source, ...]) -> Iterator[Event]:
        """All that goes before the text: the response, the search and the message have begun."""
        yield LifecycleEvent(**self._next("response.created"), response=self.begun)
        yield LifecycleEvent(**self._next("response.in_progress"), response=self.begun)
        for call in self._searches(sources):
            started = call.model_copy(update={"status": "in_progress", "queries": [], "results": None})
            yield ItemEvent(**self._next("response.output_item.added"), output_index=0, item=started)
            for stage in ("in_progress", "searching", "completed"):
                name = f"response.file_search_call.{stage}"
                yield SearchEvent(**self._next(name), output_index=0, item_id=call.id)
            yield ItemEvent(**self._next("response.output_item.done"), output_index=0, item=call)
        message = OutputMessage(id=self._message_id, status="in_progress", content=[])
        added = self._next("response.output_item.added")
        yield ItemEvent(**added, output_index=self._message_index, item=message)
        yield PartEvent(**self._in_text("response.content_part.added"), part=OutputText(text=""))

    def more(self, said: CitedPiece) -> Iterator[Event]:
        self._text.append(said.text)
        if said.text:
            yield DeltaEvent(**self._in_text("response.output_text.delta"), delta=said.text)
        for citation in said.citations:
            self._citations.append(citation)
            named = self._in_text("response.output_text.annotation.added")
            yield AnnotationEvent(**named, annotation_index=citation.number, annotation=file_citation(citation))

    def message_done(self, finished: ResponseReply) -> Iterator[Event]:
        message = finished.output[self._message_index]
        assert isinstance(message, OutputMessage)
        (part,) = message.content
        yield TextDoneEvent(**self._in_text("response.output_text.done"), text=part.text)
        yield PartEvent(**self._in_text("response.content_part.done"), part=part)
        yield ItemEvent(**self._next("response.output_item.done"), output_index=self._message_index, item=message)

    def last(self, finished: ResponseReply) -> Event:
        return LifecycleEvent(**self._next(f"response.{finished.status}"), response=finished)

    def failed(self, error: ErrorReply) -> Iterator[Event]:
        """The end of a stream that failed in its middle."""
        named = self._next("error")
        yield ErrorEvent(**named, code=error.code or error.type, message=error.message, param=error.param)
        failure = ResponseFailure(code="server_error", message=error.message)
        update = {"status": "failed", "error": failure, "store": False}
        yield LifecycleEvent(**self._next("response.failed"), response=self.begun.model_copy(update=update))

    def _next(self, name: str) -> dict[str, Any]:
        self._num_events += 1
        return {"type": name, "sequence_number": self._num_events - 1}

    def _in_text(self, name: str) -> dict[str, Any]:
        return {**self._next(name), "output_index": self._message_index, "item_id": self._message_id}

    def _message(self, said: CitedPiece, status: Status) -> OutputMessage:
        part = OutputText(text=said.text, annotations=[file_citation(c) for c in said.citations])
        return OutputMessage(id=self._message_id, status=status, content=[part])

    def _searches(self, sources: tuple[Source, ...]) -> list[FileSearchCall]:
        """The one search, or none."""
        if self.question is None:
            return []
        results = None
        if self.includes_results:
            results = [result_reply(source, self.attributes.get(source.document_id, {})) for source in sources]
        call_id = self.begun.id.replace("resp_", "fs_")
        return [FileSearchCall(id=call_id, status="completed", queries=[self.question], results=results)]
