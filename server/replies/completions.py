"""The answers of the OpenAI API as this server spells them. Knows nothing of HTTP, of SSE or of how answers come about.

Extensions: `sources` (the passages shown to the model: in a completion, and on the first chunk of a stream and the one
with its `finish_reason`), `usage.fusionrag` (what was reused and where the time went), and `annotations` on the deltas
of a stream, each on the chunk that completes its sentence or on the one with the `finish_reason`.
`usage.prompt_tokens_details.cached_tokens` counts the tokens whose stored KV was used as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import BaseModel, Field

from fusionrag.rag import Source
from server.answer import Answer
from server.citations import Citation, CitedPiece
from server.replies.citations import ChatAnnotation, chat_annotations


def _is_none(value: object) -> bool:
    return value is None


def _is_empty(value: Sequence[object]) -> bool:
    return not value


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
    """What happened to one passage's KV. `recomputed`, where the request says `explain`: the characters [begin, end) of
    the text of the source with this `chunk_id` that were recomputed."""

    chunk_id: str
    source: str
    kind: str
    num_tokens: int
    num_recomputed: int
    recomputed: list[tuple[int, int]] | None = Field(default=None, exclude_if=_is_none)


class Receipt(BaseModel):
    """What one answer cost, up to its first token. Milliseconds as the engine measured them.

    `way` is how it got there: reuse, prefix (the first passage's KV alone) or full. `predicted_ms` is what the engine
    expected of it, waiting and retrieval aside; null where it went as asked, without a choice. `predicted_full_ms` is
    what `ttft_ms` would be without reuse, null while the machine's speed is not known. `kv_arrival_ms` is how long
    stored KV was on its way to the GPU, beside the phases; 0 on a CPU, where it is the phase `load`.
    """

    ttft_ms: float
    way: str
    predicted_ms: float | None
    predicted_full_ms: float | None
    phases_ms: dict[str, float]
    kv_arrival_ms: float
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


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    annotations: list[ChatAnnotation]


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
    annotations: list[ChatAnnotation] = Field(default=[], exclude_if=_is_empty)


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


def receipt_reply(answer: Answer) -> Receipt:
    stats, explained = answer.stats, answer.recomputed_text
    chunks = [
        ChunkReply(
            chunk_id=c.chunk_id,
            source=c.source.value,
            kind=c.kind,
            num_tokens=c.num_tokens,
            num_recomputed=c.num_recomputed,
            recomputed=list(explained[i]) if explained else None,
        )
        for i, c in enumerate(stats.chunks)
    ]
    return Receipt(
        ttft_ms=stats.ttft_ms,
        way=stats.way,
        predicted_ms=stats.predicted_ms,
        predicted_full_ms=stats.predicted_full_ms,
        phases_ms={name.removesuffix("_ms"): ms for name, ms in asdict(stats.phases).items()},
        kv_arrival_ms=stats.arrival_ms,
        reused_tokens=stats.reused_tokens,
        recomputed_tokens=stats.recomputed_tokens,
        computed_tokens=stats.computed_tokens,
        chunks=chunks,
    )


def usage_reply(answer: Answer) -> Usage:
    stats = answer.stats
    return Usage(
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.completion_tokens,
        total_tokens=stats.prompt_tokens + stats.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=stats.reused_tokens),
        fusionrag=receipt_reply(answer),
    )


def source_replies(sources: Sequence[Source]) -> list[SourceReply]:
    return [SourceReply(**asdict(s)) for s in sources]


@dataclass(frozen=True)
class ChatWording:
    """Spells one answer for /v1/chat/completions. `id` and `created` are the same on all its parts."""

    id: str
    created: int
    model: str

    def whole(self, said: CitedPiece, answer: Answer) -> BaseModel:
        message = ChatMessage(content=said.text, annotations=chat_annotations(said.citations))
        return ChatCompletion(
            **asdict(self),
            choices=[ChatChoice(message=message, finish_reason=answer.finish_reason)],
            usage=usage_reply(answer),
            sources=source_replies(answer.sources),
        )

    def first(self, said: CitedPiece, answer: Answer) -> BaseModel:
        """Role, first content and sources: one chunk, because a role alone would look like a first token."""
        delta = Delta(role="assistant", content=said.text, annotations=chat_annotations(said.citations))
        return self._chunk(ChatChunkChoice(delta=delta), answer.sources)

    def more(self, said: CitedPiece) -> BaseModel:
        delta = Delta(content=said.text, annotations=chat_annotations(said.citations))
        return self._chunk(ChatChunkChoice(delta=delta))

    def last(self, citations: Sequence[Citation], answer: Answer) -> BaseModel:
        """The citations that came without text, and the sources again, for clients that look at the end only."""
        delta = Delta(annotations=chat_annotations(citations))
        return self._chunk(ChatChunkChoice(delta=delta, finish_reason=answer.finish_reason), answer.sources)

    def usage(self, answer: Answer) -> BaseModel:
        return ChatChunk(**asdict(self), choices=[], usage=usage_reply(answer))

    def _chunk(self, choice: ChatChunkChoice, sources: Sequence[Source] | None = None) -> ChatChunk:
        shown = None if sources is None else source_replies(sources)
        return ChatChunk(**asdict(self), choices=[choice], sources=shown)


@dataclass(frozen=True)
class TextWording:
    """Spells one answer for /v1/completions. Its `sources` are empty: a plain prompt has no retrieval."""

    id: str
    created: int
    model: str

    def whole(self, said: CitedPiece, answer: Answer) -> BaseModel:
        choice = TextChoice(text=said.text, finish_reason=answer.finish_reason)
        return TextCompletion(
            **asdict(self), choices=[choice], usage=usage_reply(answer), sources=source_replies(answer.sources)
        )

    def first(self, said: CitedPiece, answer: Answer) -> BaseModel:
        sources = source_replies(answer.sources)
        return TextCompletion(**asdict(self), choices=[TextChoice(text=said.text)], sources=sources)

    def more(self, said: CitedPiece) -> BaseModel:
        return TextCompletion(**asdict(self), choices=[TextChoice(text=said.text)])

    def last(self, _: Sequence[Citation], answer: Answer) -> BaseModel:
        return TextCompletion(**asdict(self), choices=[TextChoice(text="", finish_reason=answer.finish_reason)])

    def usage(self, answer: Answer) -> BaseModel:
        return TextCompletion(**asdict(self), choices=[], usage=usage_reply(answer))
