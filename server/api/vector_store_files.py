"""/v1/vector_stores/{id}/files and …/file_batches: files on their way into a collection, and out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response

from index.library_types import AttachedFile, FileBatch
from server.api.common import ERRORS, json_response
from server.api.vector_stores import PATH
from server.live import LiveCollections
from server.protocol.paging import AttachedFilesQuery
from server.protocol.vector_stores import AttachFile, CreateFileBatch, UpdateAttributes
from server.replies.paging import ListReply, list_reply
from server.replies.vector_stores import (
    FileBatchObject,
    FileContent,
    VectorStoreFile,
    VectorStoreFileDeleted,
    file_batch_object,
    file_content,
    vector_store_file,
)
from server.services import Services, owner_of

POLL_HEADERS = {"openai-poll-after-ms": "250"}  # official clients wait a second otherwise


def add_routes(app: FastAPI, services: Services) -> None:
    """None where collections change by the command line only."""
    if services.live is None:
        return
    routes = _Routes(services, services.live)
    files, batches = PATH + "/{vector_store_id}/files", PATH + "/{vector_store_id}/file_batches"
    file, batch = files + "/{file_id}", batches + "/{batch_id}"
    add, listed = app.add_api_route, ListReply[VectorStoreFile]
    add(files, routes.attach, methods=["POST"], response_model=VectorStoreFile, responses=ERRORS)
    add(files, routes.list_files, response_model=listed, responses=ERRORS)
    add(file, routes.get, response_model=VectorStoreFile, responses=ERRORS)
    add(file, routes.update, methods=["POST"], response_model=VectorStoreFile, responses=ERRORS)
    add(file, routes.detach, methods=["DELETE"], response_model=VectorStoreFileDeleted, responses=ERRORS)
    add(file + "/content", routes.get_content, response_model=FileContent, responses=ERRORS)
    add(batches, routes.create_batch, methods=["POST"], response_model=FileBatchObject, responses=ERRORS)
    add(batch, routes.get_batch, response_model=FileBatchObject, responses=ERRORS)
    add(batch + "/cancel", routes.cancel_batch, methods=["POST"], response_model=FileBatchObject, responses=ERRORS)
    add(batch + "/files", routes.list_batch, response_model=listed, responses=ERRORS)


@dataclass(frozen=True)
class _Routes:
    services: Services
    live: LiveCollections

    async def attach(self, body: AttachFile, request: Request, vector_store_id: str) -> Response:
        """Has the file ingested in the background. It fails at once where nobody can read its format."""
        attached = self.live.library.attached
        file = await self.services.preparation.run(
            attached.attach, vector_store_id, owner_of(request), body.attachment()
        )
        self.live.ingestion.wake()
        return json_response(self._spelled(file), POLL_HEADERS)

    async def list_files(
        self, request: Request, vector_store_id: str, query: Annotated[AttachedFilesQuery, Query()]
    ) -> Response:
        return await self._listed(request, vector_store_id, query, None)

    async def get(self, request: Request, vector_store_id: str, file_id: str) -> Response:
        attached = self.live.library.attached
        file = await self.services.preparation.run(attached.get, vector_store_id, owner_of(request), file_id)
        return json_response(self._spelled(file), POLL_HEADERS)

    async def update(self, body: UpdateAttributes, request: Request, vector_store_id: str, file_id: str) -> Response:
        """Sets the file's attributes, by which searches can be filtered."""
        attached = self.live.library.attached
        file = await self.services.preparation.run(
            attached.update, vector_store_id, owner_of(request), file_id, body.attributes or {}
        )
        return json_response(self._spelled(file))

    async def detach(self, request: Request, vector_store_id: str, file_id: str) -> Response:
        """Takes the file out of the collection. The file itself stays."""
        attached = self.live.library.attached
        await self.services.preparation.run(attached.detach, vector_store_id, owner_of(request), file_id)
        return json_response(VectorStoreFileDeleted(id=file_id))

    async def get_content(self, request: Request, vector_store_id: str, file_id: str) -> Response:
        """The passages that were read from the file."""
        attached = self.live.library.attached
        texts = await self.services.preparation.run(attached.texts, vector_store_id, owner_of(request), file_id)
        return json_response(file_content(texts))

    async def create_batch(self, body: CreateFileBatch, request: Request, vector_store_id: str) -> Response:
        """Attaches many files at once."""
        attached = self.live.library.attached
        batch = await self.services.preparation.run(
            attached.attach_batch, vector_store_id, owner_of(request), body.attachments()
        )
        self.live.ingestion.wake()
        return _batch_response(batch)

    async def get_batch(self, request: Request, vector_store_id: str, batch_id: str) -> Response:
        attached = self.live.library.attached
        return _batch_response(
            await self.services.preparation.run(attached.batch, vector_store_id, owner_of(request), batch_id)
        )

    async def cancel_batch(self, request: Request, vector_store_id: str, batch_id: str) -> Response:
        """Takes back the files of the batch that are not done yet."""
        attached = self.live.library.attached
        return _batch_response(
            await self.services.preparation.run(attached.cancel_batch, vector_store_id, owner_of(request), batch_id)
        )

    async def list_batch(
        self, request: Request, vector_store_id: str, batch_id: str, query: Annotated[AttachedFilesQuery, Query()]
    ) -> Response:
        return await self._listed(request, vector_store_id, query, batch_id)

    async def _listed(self, request: Request, store: str, query: AttachedFilesQuery, batch_id: str | None) -> Response:
        attached = self.live.library.attached
        page = await self.services.preparation.run(
            attached.page, store, owner_of(request), query.request(), query.filter, batch_id
        )
        return json_response(list_reply(page, self._spelled))

    def _spelled(self, file: AttachedFile) -> VectorStoreFile:
        progress = self.live.ingestion.progress(file.collection, file.file_id)
        return vector_store_file(file, self.live.chunking, progress)


def _batch_response(batch: FileBatch) -> Response:
    return json_response(file_batch_object(batch), POLL_HEADERS)
