"""What the query strings of lists say."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from index.library_types import FileStatus
from index.paging import PageRequest
from server.protocol.files import MAX_ID, PURPOSES

MAX_FILES = 10_000  # of one page; OpenAI's limit and default


class Query(BaseModel):
    """A query string, whose values are all text. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ListQuery(Query):
    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"
    after: str | None = Field(None, max_length=MAX_ID)
    before: str | None = Field(None, max_length=MAX_ID)

    def request(self) -> PageRequest:
        return PageRequest(self.limit, self.order, self.after, self.before)


class AttachedFilesQuery(ListQuery):
    filter: FileStatus | None = None


class FilesQuery(Query):
    limit: int = Field(MAX_FILES, ge=1, le=MAX_FILES)
    order: Literal["asc", "desc"] = "desc"
    after: str | None = Field(None, max_length=MAX_ID)
    purpose: str | None = Field(None, max_length=MAX_ID, description=f"one of {', '.join(PURPOSES)}")

    def request(self) -> PageRequest:
        return PageRequest(self.limit, self.order, self.after)
