"""Requests for responses as this server reads them. Knows nothing of HTTP.

Text in, text out, and one tool: `file_search`. The model does not decide about it: where the request offers it, and
does not say `tool_choice: "none"`, the vector stores are searched, once, for the last question.

Search calls that come back in `input` (clients send whole outputs back) are accepted and left out: what was found for
an earlier question is found again where the conversation needs it.

Extensions, sent through the official client's `extra_body`: `recompute_ratio`, `method` and `explain`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from fusionrag.config import ReuseConfig
from fusionrag.errors import RequestError
from fusionrag.rag import Question, Turn
from fusionrag.sampling import SamplingParams
from index.config import SearchConfig
from index.errors import InvalidValue
from index.filters import parse_filter
from server.protocol.common import MAX_NAME, Body, Strict, only
from server.protocol.completions import changed_reuse
from server.protocol.search import MAX_RESULTS, RankingOptions, changed_search

MAX_STORES = 16
MAX_LABELS, MAX_LABEL_NAME, MAX_LABEL = 16, 64, 512
_TEXT = {"type": "text"}
_TEXT_PARTS = ("input_text", "output_text")


def _joined_parts(content: object) -> object:
    """The text of a message: a string, or a list of text parts, which are joined by line breaks."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        is_text = isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)
        if not is_text:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"part {i} is {kind!r}; only parts {{'type': 'input_text', 'text': …}} are supported")
    return "\n".join(part["text"] for part in content)


def _messages(value: object) -> object:
    """The messages of an input: of one text the user's, of a list of items those that are messages."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        return value
    messages = []
    for i, item in enumerate(value):
        kind = item.get("type", "message") if isinstance(item, dict) else type(item).__name__
        if kind == "message":
            messages.append(item)
        elif kind != "file_search_call":
            raise ValueError(f"item {i} is {kind!r}; only messages of text are supported")
    return messages


def _labels(value: dict[str, str]) -> dict[str, str]:
    if len(value) > MAX_LABELS:
        raise ValueError(f"at most {MAX_LABELS} keys")
    if any(len(name) > MAX_LABEL_NAME or len(label) > MAX_LABEL for name, label in value.items()):
        raise ValueError(f"keys have at most {MAX_LABEL_NAME} characters, values {MAX_LABEL}")
    return value


class InputMessage(Strict):
    """One turn. Answers come back as they were given, so what the server adds to messages is accepted."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[str, BeforeValidator(_joined_parts, json_schema_input_type=str | list[dict[str, Any]])]
    type: Literal["message"] = "message"
    id: str | None = Field(default=None, max_length=MAX_NAME)
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    @property
    def turn(self) -> Turn:
        return Turn("system" if self.role == "developer" else self.role, self.content)


class FileSearchTool(Strict):
    type: Literal["file_search"]
    vector_store_ids: list[Annotated[str, Field(min_length=1, max_length=MAX_NAME)]] = Field(
        min_length=1, max_length=MAX_STORES
    )
    max_num_results: int | None = Field(default=None, ge=1, le=MAX_RESULTS)
    filters: dict[str, Any] | None = None
    ranking_options: RankingOptions | None = None


class ChosenTool(Strict):
    type: Literal["file_search"]


class ResponseRequest(Body):
    """POST /v1/responses. Sampling is greedy unless asked for, as for completions."""

    model: str = Field(max_length=MAX_NAME)
    input: Annotated[
        list[InputMessage], BeforeValidator(_messages, json_schema_input_type=str | list[InputMessage])
    ] = Field(min_length=1)
    instructions: str | None = None
    previous_response_id: str | None = Field(default=None, min_length=1, max_length=MAX_NAME)
    tools: list[FileSearchTool] | None = Field(default=None, max_length=1)
    tool_choice: Literal["auto", "none", "required"] | ChosenTool | None = None
    include: list[Literal["file_search_call.results"]] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    store: bool | None = Field(default=None, description="keep the response, where the server keeps any; so by default")
    metadata: Annotated[dict[str, str], AfterValidator(_labels)] | None = None

    recompute_ratio: float | None = Field(default=None, description="share of the reused tokens that is recomputed")
    method: str | None = Field(default=None, description="how the recomputed tokens are chosen")
    explain: bool | None = Field(default=None, description="say which parts of the passages were recomputed")

    user: str | None = None  # whom the client serves; kept out of prompts and logs
    safety_identifier: str | None = None  # like `user`
    prompt_cache_key: str | None = None  # a routing hint: reuse here needs none
    parallel_tool_calls: bool | None = None  # there is one tool: both values mean the same
    stream_options: Annotated[Any, only({}, {"include_obfuscation": False})] = None
    background: Annotated[Any, only(False)] = None
    text: Annotated[
        Any,
        only(
            {},
            {"format": {"type": "text"}},
            {"verbosity": "medium"},
            {"format": {"type": "text"}, "verbosity": "medium"},
        ),
    ] = None
    reasoning: Annotated[Any, only({}, {"effort": "none"})] = None
    truncation: Annotated[Any, only("disabled")] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    top_logprobs: Annotated[Any, only(0)] = None
    access_programs: Annotated[Any, only()] = None
    background_options: Annotated[Any, only()] = None
    context_management: Annotated[Any, only([])] = None
    conversation: Annotated[Any, only()] = None
    image: Annotated[Any, only()] = None
    max_tool_calls: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    prompt: Annotated[Any, only()] = None
    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only()] = None

    @property
    def search_tool(self) -> FileSearchTool | None:
        """What is searched for this response, if anything. Raises RequestError."""
        if self.tool_choice == "none":
            return None
        if not self.tools and self.tool_choice not in (None, "auto"):
            raise RequestError("tool_choice asks for a tool, but tools has none", "tool_choice")
        return self.tools[0] if self.tools else None

    @property
    def includes_results(self) -> bool:
        return bool(self.include)

    def sampling(self) -> SamplingParams:
        """Raises InvalidSampling naming the field."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_output_tokens}
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def question(
        self, owner: str, before: tuple[Turn, ...], default_reuse: ReuseConfig, default_search: SearchConfig
    ) -> Question:
        """before: the turns of the response that this one goes on from. Raises RequestError naming the parameter."""
        if self.stream_options and not self.stream:
            raise RequestError("stream_options needs 'stream': true", "stream_options")
        if self.input[-1].role != "user":
            raise RequestError("the last message must have role 'user'", "input")
        if not self.input[-1].content.strip():
            raise RequestError("the last message is empty: there is no question to answer", "input")
        tool = self.search_tool
        instructions = (Turn("system", self.instructions),) if self.instructions else ()
        return Question(
            turns=(*instructions, *before, *(message.turn for message in self.input)),
            collections=tuple(tool.vector_store_ids) if tool else (),
            search=_search(tool, default_search) if tool else None,
            filter=parse_filter(tool.filters, "tools[0].filters") if tool and tool.filters is not None else None,
            sampling=self.sampling(),
            reuse=changed_reuse(default_reuse, self.method, self.recompute_ratio),
            owner=owner,
            explain=bool(self.explain),
        )


def _search(tool: FileSearchTool, default: SearchConfig) -> SearchConfig | None:
    try:
        return changed_search(default, tool.max_num_results, tool.ranking_options)
    except InvalidValue as error:
        raise RequestError(str(error), "tools") from error
