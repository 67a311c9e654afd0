"""What the routes of vector stores and of the files attached to them take, in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from index.config import SearchConfig
from index.filters import Filter, parse_filter
from index.library_types import Attachment, Attributes, VectorStoreSettings
from server.protocol.common import MAX_NAME, Body, Strict, only
from server.protocol.files import MAX_ID
from server.protocol.search import MAX_RESULTS, RankingOptions, changed_search

MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512  # of metadata and attributes; lengths in characters
MAX_FILES = 2000  # attached by one request
MAX_QUERIES, MAX_QUERY = 10, 4096
MAX_DAYS = 365


def _checked_attributes(values: dict[str, Any]) -> dict[str, Any]:
    if len(values) > MAX_PAIRS:
        raise ValueError(f"at most {MAX_PAIRS} pairs are kept, got {len(values)}")
    for key, value in values.items():
        if not 1 <= len(key) <= MAX_KEY:
            raise ValueError(f"keys must have 1 to {MAX_KEY} characters, got {key[: MAX_KEY + 1]!r}")
        if not isinstance(value, str | bool | int | float):
            raise ValueError(f"the value of {key!r} must be a string, a number or a boolean")
        if isinstance(value, str) and len(value) > MAX_VALUE:
            raise ValueError(f"the value of {key!r} has more than {MAX_VALUE} characters")
        if not isinstance(value, str) and not abs(value) <= 1e300:
            raise ValueError(f"the value of {key!r} is too large a number")
    return values


def _checked_metadata(values: dict[str, Any]) -> dict[str, Any]:
    for key, value in _checked_attributes(values).items():
        if not isinstance(value, str):
            raise ValueError(f"the value of {key!r} must be a string")
    return values


def _schema_of_pairs(*types: str) -> WithJsonSchema:
    values: list[dict[str, Any]] = [
        {"type": t, "maxLength": MAX_VALUE} if t == "string" else {"type": t} for t in types
    ]
    keys = {"minLength": 1, "maxLength": MAX_KEY}
    any_of = {"anyOf": values} if len(values) > 1 else values[0]
    return WithJsonSchema(
        {"type": "object", "maxProperties": MAX_PAIRS, "propertyNames": keys, "additionalProperties": any_of}
    )


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _not_blank(queries: list[str]) -> list[str]:
    if not all(query.strip() for query in queries):
        raise ValueError("must not be empty")
    return queries


AttributesField = Annotated[
    dict[str, Any], AfterValidator(_checked_attributes), _schema_of_pairs("string", "number", "boolean")
]
MetadataField = Annotated[dict[str, Any], AfterValidator(_checked_metadata), _schema_of_pairs("string")]
FileId = Annotated[str, Field(max_length=MAX_ID)]
_ONE_QUERY: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_QUERY, "pattern": r"\S"}
Queries = Annotated[
    list[Annotated[str, Field(max_length=MAX_QUERY)]],
    Field(min_length=1, max_length=MAX_QUERIES),
    BeforeValidator(_as_list),
    AfterValidator(_not_blank),
    WithJsonSchema(
        {"anyOf": [_ONE_QUERY, {"type": "array", "items": _ONE_QUERY, "minItems": 1, "maxItems": MAX_QUERIES}]}
    ),
]


class StaticChunking(Strict):
    max_chunk_size_tokens: int = Field(ge=100, le=4096)
    chunk_overlap_tokens: int = Field(ge=0)

    @model_validator(mode="after")
    def _overlap_fits(self) -> StaticChunking:
        if self.chunk_overlap_tokens > self.max_chunk_size_tokens // 2:
            raise ValueError("chunk_overlap_tokens must not exceed half of max_chunk_size_tokens")
        return self


class ChunkingStrategy(Strict):
    """`auto` is the server's own chunk size. Sizes are tokens of the language model, title included."""

    type: Literal["auto", "static"]
    static: StaticChunking | None = None

    @model_validator(mode="after")
    def _sizes_fit(self) -> ChunkingStrategy:
        if (self.type == "static") != (self.static is not None):
            raise ValueError("'static' must be given with the type 'static', and with no other")
        return self


class StoreExpiry(Strict):
    anchor: Literal["last_active_at"]
    days: int = Field(ge=1, le=MAX_DAYS)


def _attachment(
    file_id: str, attributes: Attributes | None = None, chunking: ChunkingStrategy | None = None
) -> Attachment:
    sizes = None if chunking is None else chunking.static
    if sizes is None:
        return Attachment(file_id, attributes)
    return Attachment(file_id, attributes, sizes.max_chunk_size_tokens, sizes.chunk_overlap_tokens)


class VectorStoreRequest(Body):
    """What can be said of a vector store, now or later. null stands for what it is without being told."""

    name: str | None = Field(None, max_length=MAX_NAME)
    description: str | None = Field(None, max_length=MAX_VALUE)
    metadata: MetadataField | None = None
    expires_after: StoreExpiry | None = None

    def settings(self, old: VectorStoreSettings | None = None) -> VectorStoreSettings:
        """The settings asked for; those not mentioned are the old ones."""
        asked: Mapping[str, Any] = {
            "title": self.name or "",
            "description": self.description or "",
            "metadata": self.metadata or {},
            "expires_after_days": None if self.expires_after is None else self.expires_after.days,
        }
        names = {"name": "title", "expires_after": "expires_after_days"}
        said = {names.get(field, field) for field in self.model_fields_set}
        return replace(old or VectorStoreSettings(), **{k: v for k, v in asked.items() if k in said})


class CreateVectorStore(VectorStoreRequest):
    file_ids: list[FileId] | None = Field(None, max_length=MAX_FILES)
    chunking_strategy: ChunkingStrategy | None = None

    def attachments(self) -> list[Attachment]:
        return [_attachment(file_id, None, self.chunking_strategy) for file_id in self.file_ids or ()]


class UpdateVectorStore(VectorStoreRequest):
    pass


class AttachFile(Body):
    file_id: FileId
    attributes: AttributesField | None = None
    chunking_strategy: ChunkingStrategy | None = None

    def attachment(self) -> Attachment:
        return _attachment(self.file_id, self.attributes, self.chunking_strategy)


class UpdateAttributes(Body):
    attributes: AttributesField | None


class FileOfBatch(Strict):
    file_id: FileId
    attributes: AttributesField | None = None
    chunking_strategy: ChunkingStrategy | None = None


class CreateFileBatch(Body):
    """Either `file_ids`, which share attributes and chunking, or `files`, each with its own."""

    file_ids: list[FileId] | None = Field(None, min_length=1, max_length=MAX_FILES)
    files: list[FileOfBatch] | None = Field(None, min_length=1, max_length=MAX_FILES)
    attributes: AttributesField | None = None
    chunking_strategy: ChunkingStrategy | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> CreateFileBatch:
        if (self.file_ids is None) == (self.files is None):
            raise ValueError("send either 'file_ids' or 'files'")
        if self.files is not None and (self.attributes is not None or self.chunking_strategy is not None):
            raise ValueError("with 'files', attributes and chunking_strategy belong to each file")
        return self

    def attachments(self) -> list[Attachment]:
        if self.files is not None:
            return [_attachment(f.file_id, f.attributes, f.chunking_strategy) for f in self.files]
        return [_attachment(file_id, self.attributes, self.chunking_strategy) for file_id in self.file_ids or ()]


class SearchRequest(Body):
    """Several queries find what each of them finds; a passage has the best of its scores."""

    query: Queries
    filters: Annotated[Any, WithJsonSchema({"type": "object"})] = None
    max_num_results: int = Field(10, ge=1, le=MAX_RESULTS)
    ranking_options: RankingOptions | None = None
    rewrite_query: Annotated[Any, only(False)] = None

    def filter(self) -> Filter | None:
        """Raises InvalidValue."""
        return None if self.filters is None else parse_filter(self.filters)

    def search(self, configured: SearchConfig) -> SearchConfig:
        """The server's way to search, with what the request changes of it."""
        return changed_search(configured, self.max_num_results, self.ranking_options) or configured
