"""Responses as this server spells them: the object and its items (events: `response_events`). Knows nothing of HTTP.

Extension: `usage.fusionrag`, the receipt of completions. `usage.input_tokens_details.cached_tokens` counts the tokens
whose stored KV was used as it was.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

from fusionrag.rag import Source
from index.library_types import Attributes
from server.answer import Answer
from server.replies.citations import FileCitation, cited_file
from server.replies.completions import Receipt, receipt_reply

Status: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[FileCitation] = []
    logprobs: list[None] = []


class InputText(BaseModel):
    type: Literal["input_text"] = "input_text"
    text: str


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class InputItem(BaseModel):
    """A message as it was sent; an assistant's is one that the client brought along."""

    id: str
    type: Literal["message"] = "message"
    status: Literal["completed"] = "completed"
    role: Literal["user", "assistant", "system", "developer"]
    content: list[InputText | OutputText]


class SearchResult(BaseModel):
    """One passage. `score` is between 0 and 1, whatever the search's own scale; `chunk_id` is that of the receipt."""

    file_id: str
    filename: str
    score: float
    attributes: dict[str, str | bool | int | float]
    text: str
    chunk_id: str


class FileSearchCall(BaseModel):
    id: str
    type: Literal["file_search_call"] = "file_search_call"
    status: Literal["in_progress", "completed"]
    queries: list[str]
    results: list[SearchResult] | None = None


OutputItem: TypeAlias = FileSearchCall | OutputMessage


class InputTokensDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: Literal[0] = 0


class OutputTokensDetails(BaseModel):
    reasoning_tokens: Literal[0] = 0


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int
    fusionrag: Receipt


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseFailure(BaseModel):
    code: str
    message: str


class ResponseReply(BaseModel):
    """A response. The fields behind `usage` say what was asked for, or what this server always does."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status = "in_progress"
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputItem] = []
    usage: ResponseUsage | None = None

    instructions: str | None
    max_output_tokens: int
    temperature: float
    top_p: float
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, str]
    previous_response_id: str | None
    store: bool
    metadata: dict[str, str]
    user: str | None
    parallel_tool_calls: bool = True
    background: Literal[False] = False
    service_tier: Literal["default"] = "default"
    text: dict[str, dict[str, str]] = {"format": {"type": "text"}}
    top_logprobs: Literal[0] = 0
    truncation: Literal["disabled"] = "disabled"


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputItemList(BaseModel):
    object: Literal["list"] = "list"
    data: list[InputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


def result_reply(source: Source, attributes: Attributes) -> SearchResult:
    file, score = cited_file(source), min(1.0, max(0.0, source.score or 0.0))
    return SearchResult(
        file_id=file.file_id,
        filename=file.filename,
        score=score,
        attributes=dict(attributes),
        text=source.text,
        chunk_id=source.chunk_id,
    )


def response_usage(answer: Answer) -> ResponseUsage:
    stats = answer.stats
    return ResponseUsage(
        input_tokens=stats.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=stats.reused_tokens),
        output_tokens=stats.completion_tokens,
        total_tokens=stats.prompt_tokens + stats.completion_tokens,
        fusionrag=receipt_reply(answer),
    )
