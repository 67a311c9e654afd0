"""Requests for completions as this server reads them; ranges are checked by SamplingParams, ReuseConfig and their kin.

Knows nothing of HTTP.

Extensions, sent through the official client's `extra_body`: `top_k`, `min_p`, `repetition_penalty` and `ignore_eos`;
for chats also `collection`, `documents`, `retrieval_top_k`, `filters`, `ranking_options`, `recompute_ratio`, `method`,
`citations` and `explain`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fusionrag.config import ReuseConfig
from fusionrag.errors import ConfigError, RequestError
from fusionrag.rag import InlineDocument, Question, Turn, with_ratio
from fusionrag.sampling import SamplingParams
from index.config import SearchConfig
from index.errors import InvalidValue
from index.filters import Filter, parse_filter
from server.citations import CitationStyle
from server.protocol.common import MAX_NAME, Body, Strict, joined_text, only
from server.protocol.search import RankingOptions, changed_search

MAX_STOPS = 4


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def changed_reuse(default: ReuseConfig, method: str | None, recompute_ratio: float | None) -> ReuseConfig | None:
    """The server's way of reuse with a request's changes; None when there are none. Raises RequestError."""
    if method is None and recompute_ratio is None:
        return None
    try:
        return with_ratio(default, method, recompute_ratio)
    except ConfigError as error:
        raise RequestError(str(error), error.field) from error


def _single(value: object) -> object:
    """Some clients wrap their one prompt into a list."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], str):
            raise ValueError("send one prompt per request, as text; several prompts or token ids are not supported")
        return value[0]
    return value


class Message(Strict):
    """One turn. Clients send assistant turns back as they got them, so an assistant's empty fields are accepted."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(joined_text)]
    name: Annotated[Any, only()] = None
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None
    annotations: list[Any] | None = None  # our own citations, coming back: nothing to honour


class RequestDocument(Strict):
    """A passage that the request brings along."""

    text: str = Field(min_length=1)
    title: str = ""
    id: str = ""


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class GenerationRequest(Body):
    """What both completion endpoints take. Sampling is greedy unless asked for: an answer from documents should be
    the same twice (OpenAI's own default is temperature 1)."""

    model: str = Field(max_length=MAX_NAME)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_listed)] = Field(
        default=None, max_length=MAX_STOPS
    )
    seed: int | None = None

    top_k: int | None = Field(default=None, description="sample from the k most likely tokens; 0: from all")
    min_p: float | None = Field(default=None, description="least probability, relative to the likeliest token")
    repetition_penalty: float | None = Field(default=None, description="above 1: fewer repetitions")
    ignore_eos: bool | None = Field(default=None, description="go on to max_tokens; for benchmarks")

    user: str | None = None  # whom the client serves; kept out of prompts and logs
    n: Annotated[Any, only(1)] = None
    frequency_penalty: Annotated[Any, only(0, 0.0)] = None
    presence_penalty: Annotated[Any, only(0, 0.0)] = None
    logit_bias: Annotated[Any, only({})] = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> SamplingParams:
        """Raises InvalidSampling naming the field."""
        names = ("temperature", "top_p", "max_tokens", "seed", "top_k", "min_p", "repetition_penalty", "ignore_eos")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(stop=tuple(self.stop or ()), **given)

    def check_stream_options(self) -> None:
        """Raises RequestError for options of a stream that was not asked for."""
        if self.stream_options and not self.stream:
            raise RequestError("stream_options needs 'stream': true", "stream_options")


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    collection: str | None = Field(
        default=None, min_length=1, max_length=MAX_NAME, description="where passages are retrieved from"
    )
    documents: list[RequestDocument] | None = Field(default=None, min_length=1, description="passages to use instead")
    retrieval_top_k: int | None = Field(default=None, ge=1, description="passages to retrieve")
    recompute_ratio: float | None = Field(default=None, description="share of the reused tokens that is recomputed")
    method: str | None = Field(default=None, description="how the recomputed tokens are chosen")
    filters: dict[str, Any] | None = Field(
        default=None, description="condition on the documents' metadata, in the form of OpenAI's vector stores"
    )
    ranking_options: RankingOptions | None = Field(
        default=None, description="threshold, re-ranking and weights of the search, as `file_search` takes them"
    )
    citations: CitationStyle | None = Field(
        default=None,
        description="annotations (the default), inline (annotations, and markers [n] in the text: n is the `index` of "
        "the source) or none",
    )
    explain: bool | None = Field(default=None, description="say which parts of the passages were recomputed")

    metadata: dict[str, str] | None = None  # labels for OpenAI's own store
    safety_identifier: str | None = None  # like `user`
    prompt_cache_key: str | None = None  # a routing hint: reuse here needs none
    parallel_tool_calls: bool | None = None  # without tools both values mean the same
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    logprobs: Annotated[Any, only(False)] = None
    top_logprobs: Annotated[Any, only(0)] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    modalities: Annotated[Any, only(["text"])] = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    reasoning_effort: Annotated[Any, only("none")] = None
    verbosity: Annotated[Any, only("medium")] = None
    audio: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None

    def sampling(self) -> SamplingParams:
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise RequestError("max_tokens and max_completion_tokens differ; send one", "max_completion_tokens")
        sampling = super().sampling()
        return replace(sampling, max_tokens=limits.pop()) if limits else sampling

    def question(
        self, owner: str, default_collection: str, default_reuse: ReuseConfig, default_search: SearchConfig
    ) -> Question:
        """Raises RequestError naming the parameter at fault."""
        self.check_stream_options()
        if self.messages[-1].role != "user":
            raise RequestError("the last message must have role 'user'", "messages")
        if not self.messages[-1].content.strip():
            raise RequestError("the last message is empty: there is no question to answer", "messages")
        return Question(
            turns=tuple(Turn("system" if m.role == "developer" else m.role, m.content) for m in self.messages),
            collections=self._collections(default_collection),
            documents=tuple(InlineDocument(d.title, d.text, d.id) for d in self.documents or ()),
            search=self._search(default_search),
            filter=self._filter(),
            sampling=self.sampling(),
            reuse=changed_reuse(default_reuse, self.method, self.recompute_ratio),
            owner=owner,
            explain=bool(self.explain),
        )

    def _collections(self, default_collection: str) -> tuple[str, ...]:
        if self.collection and self.documents:
            raise RequestError("name a collection or send documents, not both", "documents")
        collection = None if self.documents else self.collection or default_collection or None
        for name in ("retrieval_top_k", "filters", "ranking_options"):
            if getattr(self, name) is not None and collection is None:
                raise RequestError(f"{name} needs a collection to retrieve from", name)
        return (collection,) if collection else ()

    def _search(self, default: SearchConfig) -> SearchConfig | None:
        """The server's search with this request's changes; None when there are none."""
        try:
            return changed_search(default, self.retrieval_top_k, self.ranking_options)
        except InvalidValue as error:
            raise RequestError(str(error), "retrieval_top_k") from error

    def _filter(self) -> Filter | None:
        return None if self.filters is None else parse_filter(self.filters)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: a plain prompt, without template and retrieval."""

    prompt: Annotated[str, BeforeValidator(_single)] = Field(min_length=1)

    best_of: Annotated[Any, only(1)] = None
    echo: Annotated[Any, only(False)] = None
    logprobs: Annotated[Any, only()] = None
    suffix: Annotated[Any, only()] = None

    def question(self, owner: str) -> Question:
        """Raises RequestError naming the parameter at fault."""
        self.check_stream_options()
        return Question(prompt=self.prompt, sampling=self.sampling(), owner=owner)
