"""The answers of the OpenAI API as this server spells them. Knows nothing of HTTP, of SSE or of how answers come about.

Extensions: `sources` (the passages shown to the model: in a completion, and on the first chunk of a stream) and
`usage.fusionrag` (what was reused and where the time went). `usage.prompt_tokens_details.cached_tokens` counts the
tokens whose stored KV was used as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import BaseModel, Field

from fusionrag.rag import Source
from fusionrag.types import RequestStats


def _is_none(value: object) -> bool:
    return value is None


class SourceReply(BaseModel):
    """One passage, in the place it had in the prompt (`index`, from 1)."""

    index: int
    chunk_id: str
    document_id: str
    title: str
    source: str
    text: str
    score: float | None
    page: int | None


class ChunkReply(BaseModel):
    """What happened to one passage's KV."""

    chunk_id: str
    source: str
    kind: str
    num_tokens: int
    num_recomputed: int


class Receipt(BaseModel):
    """What one answer cost, up to its first token. Milliseconds as the engine measured them."""

    ttft_ms: float
    phases_ms: dict[str, float]
    reused_tokens: int
    recomputed_tokens: int
    computed_tokens: int
    chunks: list[ChunkReply]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    fusionrag: Receipt


class UrlCitation(BaseModel):
    url: str
    title: str
    start_index: int = 0
    end_index: int = 0


class Annotation(BaseModel):
    """The form in which chat clients show sources."""

    type: Literal["url_citation"] = "url_citation"
    url_citation: UrlCitation


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    annotations: list[Annotation]


class ChatChoice(BaseModel):
    index: int = 0
    message: ChatMessage
    logprobs: None = None
    finish_reason: str


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    sources: list[SourceReply]


class Delta(BaseModel):
    role: Literal["assistant"] | None = Field(default=None, exclude_if=_is_none)
    content: str | None = Field(default=None, exclude_if=_is_none)


class ChatChunkChoice(BaseModel):
    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = Field(default=None, exclude_if=_is_none)
    sources: list[SourceReply] | None = Field(default=None, exclude_if=_is_none)


class TextChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: str | None = None


class TextCompletion(BaseModel):
    """A whole completion and a chunk of a streamed one alike."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = Field(default=None, exclude_if=_is_none)
    sources: list[SourceReply] | None = Field(default=None, exclude_if=_is_none)


def usage_reply(stats: RequestStats) -> Usage:
    chunks = [
        ChunkReply(
            chunk_id=c.chunk_id,
            source=c.source.value,
            kind=c.kind,
            num_tokens=c.num_tokens,
            num_recomputed=c.num_recomputed,
        )
        for c in stats.chunks
    ]
    receipt = Receipt(
        ttft_ms=stats.ttft_ms,
        phases_ms={name.removesuffix("_ms"): ms for name, ms in asdict(stats.phases).items()},
        reused_tokens=stats.reused_tokens,
        recomputed_tokens=stats.recomputed_tokens,
        computed_tokens=stats.computed_tokens,
        chunks=chunks,
    )
    return Usage(
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.completion_tokens,
        total_tokens=stats.prompt_tokens + stats.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=stats.reused_tokens),
        fusionrag=receipt,
    )


def _source_replies(sources: Sequence[Source]) -> list[SourceReply]:
    return [SourceReply(**asdict(s)) for s in sources]


@dataclass(frozen=True)
class ChatWording:
    """Spells one answer for /v1/chat/completions. `id` and `created` are the same on all its parts."""

    id: str
    created: int
    model: str

    def whole(self, text: str, finish_reason: str, stats: RequestStats, sources: Sequence[Source]) -> BaseModel:
        citations = [Annotation(url_citation=UrlCitation(url=s.source, title=s.title)) for s in sources]
        choice = ChatChoice(message=ChatMessage(content=text, annotations=citations), finish_reason=finish_reason)
        return ChatCompletion(
            **asdict(self), choices=[choice], usage=usage_reply(stats), sources=_source_replies(sources)
        )

    def first(self, text: str, sources: Sequence[Source]) -> BaseModel:
        """Role, first content and sources: one chunk, because a role alone would look like a first token."""
        choice = ChatChunkChoice(delta=Delta(role="assistant", content=text))
        return ChatChunk(**asdict(self), choices=[choice], sources=_source_replies(sources))

    def more(self, text: str) -> BaseModel:
        return ChatChunk(**asdict(self), choices=[ChatChunkChoice(delta=Delta(content=text))])

    def last(self, finish_reason: str) -> BaseModel:
        return ChatChunk(**asdict(self), choices=[ChatChunkChoice(delta=Delta(), finish_reason=finish_reason)])

    def usage(self, stats: RequestStats) -> BaseModel:
        return ChatChunk(**asdict(self), choices=[], usage=usage_reply(stats))


@dataclass(frozen=True)
class TextWording:
    """Spells one answer for /v1/completions."""

    id: str
    created: int
    model: str

    def whole(self, text: str, finish_reason: str, stats: RequestStats, sources: Sequence[Source]) -> BaseModel:
        choice = TextChoice(text=text, finish_reason=finish_reason)
        return TextCompletion(
            **asdict(self), choices=[choice], usage=usage_reply(stats), sources=_source_replies(sources)
        )

    def first(self, text: str, sources: Sequence[Source]) -> BaseModel:
        return TextCompletion(**asdict(self), choices=[TextChoice(text=text)], sources=_source_replies(sources))

    def more(self, text: str) -> BaseModel:
        return TextCompletion(**asdict(self), choices=[TextChoice(text=text)])

    def last(self, finish_reason: str) -> BaseModel:
        return TextCompletion(**asdict(self), choices=[TextChoice(text="", finish_reason=finish_reason)])

    def usage(self, stats: RequestStats) -> BaseModel:
        return TextCompletion(**asdict(self), choices=[], usage=usage_reply(stats))
