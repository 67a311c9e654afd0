"""Citations as OpenAI's clients know them. Knows nothing of how sentences found their sources.

A source that was read from an uploaded file is cited under the file's id and name; one that the command line ingested,
or that a request brought along, has no file and is cited under its document's id and its source.

Chat: each citation is a `url_citation` and a `file_citation` behind it, both with the sentence's characters
[start_index, end_index). `index` is an annotation's place in the message's list: clients put the deltas of a stream
together by it.
Responses: a `file_citation` at `index`, the end of the sentence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

from pydantic import BaseModel

from fusionrag.rag import Source
from index.library_types import CitedFile
from index.types import file_of
from server.citations import Citation


class UrlCitation(BaseModel):
    url: str
    title: str
    start_index: int
    end_index: int


class UrlAnnotation(BaseModel):
    type: Literal["url_citation"] = "url_citation"
    index: int
    url_citation: UrlCitation


class ChatFileCitation(BaseModel):
    file_id: str
    filename: str
    start_index: int
    end_index: int


class FileAnnotation(BaseModel):
    type: Literal["file_citation"] = "file_citation"
    index: int
    file_citation: ChatFileCitation


ChatAnnotation: TypeAlias = UrlAnnotation | FileAnnotation


class FileCitation(BaseModel):
    """The form of the Responses API. `index` is the place in the text behind the sentence."""

    type: Literal["file_citation"] = "file_citation"
    index: int
    file_id: str
    filename: str


def cited_file(source: Source) -> CitedFile:
    """What a source is cited as; its attributes are not known here."""
    file_id = file_of(source.document_id)
    if file_id is None:
        return CitedFile(source.document_id, source.source or source.title or source.document_id, {})
    is_record = source.document_id != file_id  # its source is the file's name and the record's number
    return CitedFile(file_id, source.source.rpartition("#")[0] if is_record else source.source, {})


def chat_annotations(citations: Iterable[Citation]) -> list[ChatAnnotation]:
    annotations: list[ChatAnnotation] = []
    for c in citations:
        file, at = cited_file(c.source), {"start_index": c.begin, "end_index": c.end}
        url = UrlCitation(url=c.source.source, title=c.source.title, **at)
        cited = ChatFileCitation(file_id=file.file_id, filename=file.filename, **at)
        annotations.append(UrlAnnotation(index=2 * c.number, url_citation=url))
        annotations.append(FileAnnotation(index=2 * c.number + 1, file_citation=cited))
    return annotations


def file_citation(citation: Citation) -> FileCitation:
    file = cited_file(citation.source)
    return FileCitation(index=citation.end, file_id=file.file_id, filename=file.filename)
