"""/v1/files. The bytes are kept by `index.files`; what is done with them begins when a vector store gets them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import StreamingResponse

from server.api.common import ERRORS, json_response
from server.live import LiveCollections
from server.protocol.files import UPLOAD_SCHEMA, UploadRequest
from server.protocol.paging import FilesQuery
from server.replies.files import FileDeleted, FileObject, file_object
from server.replies.paging import ListReply, list_reply
from server.services import Services, owner_of
from server.uploads import receive_form

PATH = "/v1/files"
_BLOCK_BYTES = 256 << 10


def add_routes(app: FastAPI, services: Services) -> None:
    """None where collections change by the command line only."""
    if services.live is None:
        return
    routes, one = _Routes(services, services.live), PATH + "/{file_id}"
    add = app.add_api_route
    add(
        PATH,
        routes.upload,
        methods=["POST"],
        response_model=FileObject,
        responses=ERRORS,
        openapi_extra=UPLOAD_SCHEMA,
    )
    add(PATH, routes.list_files, response_model=ListReply[FileObject], responses=ERRORS)
    add(one, routes.get_file, response_model=FileObject, responses=ERRORS)
    add(one, routes.delete_file, methods=["DELETE"], response_model=FileDeleted, responses=ERRORS)
    binary: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    }
    add(one + "/content", routes.get_content, response_class=StreamingResponse, responses={**ERRORS, **binary})


@dataclass(frozen=True)
class _Routes:
    services: Services
    live: LiveCollections

    async def upload(self, request: Request) -> Response:
        """Keeps a file. It is read once it is attached to a vector store."""
        run, files = self.services.preparation.run, self.live.library.files
        incoming = await run(files.begin)
        try:
            form = await receive_form(request, self.services.config.max_file_bytes, incoming.write, run)
            asked = _validated(form.fields)
            seconds = None if asked.expires_after is None else asked.expires_after.seconds
            stored = await run(files.keep, incoming, owner_of(request), form.filename, asked.purpose, seconds)
        finally:
            await asyncio.to_thread(incoming.discard)
        return json_response(file_object(stored))

    async def list_files(self, request: Request, query: Annotated[FilesQuery, Query()]) -> Response:
        files = self.live.library.files
        page = await self.services.preparation.run(files.page, owner_of(request), query.request(), query.purpose)
        return json_response(list_reply(page, file_object))

    async def get_file(self, request: Request, file_id: str) -> Response:
        stored = await self.services.preparation.run(self.live.library.files.get, file_id, owner_of(request))
        return json_response(file_object(stored))

    async def delete_file(self, request: Request, file_id: str) -> Response:
        """Removes the file, and what was read from it in every vector store."""
        await self.services.preparation.run(self.live.library.files.delete, file_id, owner_of(request))
        return json_response(FileDeleted(id=file_id))

    async def get_content(self, request: Request, file_id: str) -> Response:
        """The bytes as they were uploaded."""
        run, files = self.services.preparation.run, self.live.library.files
        stored, content = await run(files.open, file_id, owner_of(request))
        headers = {"Content-Length": str(stored.num_bytes), "X-Content-Type-Options": "nosniff"}
        return StreamingResponse(_blocks(content), headers=headers, media_type="application/octet-stream")


def _validated(fields: Mapping[str, str]) -> UploadRequest:
    try:
        return UploadRequest.from_form(fields)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from error


def _blocks(content: BinaryIO) -> Iterator[bytes]:
    with content:
        while block := content.read(_BLOCK_BYTES):
            yield block
