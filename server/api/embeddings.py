"""/v1/embeddings: the model that collections are searched with, for clients that search on their own.

A text of any length is embedded whole (the embedder takes long ones in windows); what is limited is their number and
their tokens together, as that model counts them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from fastapi import FastAPI, Request, Response

from fusionrag.errors import RequestError
from index.types import FloatArray, TextEmbedder
from server.api.common import ERRORS, json_response
from server.connection import ClientConnection
from server.errors import ModelUnknown
from server.protocol.embeddings import EmbeddingRequest
from server.replies.embeddings import EmbeddingList, embedding_list
from server.services import Services, timeout_of

MAX_TOKENS = 300_000  # of all inputs together
TEXTS_AT_A_TIME = 32  # then others get their turn, and a client that has gone is noticed


def add_routes(app: FastAPI, services: Services) -> None:
    routes = _Routes(services)
    app.add_api_route("/v1/embeddings", routes.create, methods=["POST"], response_model=EmbeddingList, responses=ERRORS)


@dataclass(frozen=True)
class _Routes:
    services: Services

    async def create(self, body: EmbeddingRequest, request: Request) -> Response:
        """Unit vectors of the inputs, in their order."""
        embedder = self.services.rag.embedder
        if embedder is None or body.model != embedder.name:
            here = "none" if embedder is None else repr(embedder.name)
            raise ModelUnknown(f"no embedding model {body.model!r} here; this server has {here}")
        if body.dimensions not in (None, embedder.dim):
            raise RequestError(f"{embedder.name!r} has {embedder.dim} dimensions, no other number", "dimensions")
        run = self.services.preparation.run
        async with ClientConnection(request.receive, timeout_of(request)) as client:
            num_tokens = sum(await client.result(run(embedder.num_tokens, body.input)))
            if num_tokens > MAX_TOKENS:
                message = f"the inputs have {num_tokens} tokens, but at most {MAX_TOKENS} are embedded in one request"
                raise RequestError(message, "input")
            vectors = await client.result(self._embedded(embedder, body.input))
        as_base64 = body.encoding_format == "base64"
        return json_response(embedding_list(vectors, embedder.name, num_tokens, as_base64))

    async def _embedded(self, embedder: TextEmbedder, texts: list[str]) -> FloatArray:
        parts = [texts[at : at + TEXTS_AT_A_TIME] for at in range(0, len(texts), TEXTS_AT_A_TIME)]
        return np.concatenate([await self.services.preparation.run(embedder.embed, part) for part in parts])
