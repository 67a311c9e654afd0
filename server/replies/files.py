"""Uploaded files, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Literal

from index.library_types import StoredFile
from server.replies.paging import Identified


class FileObject(Identified):
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileDeleted(Identified):
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def file_object(stored: StoredFile) -> FileObject:
    return FileObject(
        id=stored.id,
        bytes=stored.num_bytes,
        created_at=stored.created_at,
        expires_at=stored.expires_at,
        filename=stored.filename,
        purpose=stored.purpose,
    )
