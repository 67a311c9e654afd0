"""/v1/vector_stores: collections as API clients see them, and searching them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response

from index.config import SearchConfig
from index.filters import Filter
from index.types import ScoredChunk
from server.api.common import ERRORS, json_response
from server.live import LiveCollections
from server.protocol.paging import ListQuery
from server.protocol.vector_stores import CreateVectorStore, SearchRequest, UpdateVectorStore
from server.replies.paging import ListReply, list_reply
from server.replies.vector_stores import (
    SearchResults,
    VectorStoreDeleted,
    VectorStoreObject,
    search_results,
    vector_store_object,
)
from server.services import Services, owner_of, record_of

PATH = "/v1/vector_stores"


def add_routes(app: FastAPI, services: Services) -> None:
    """None where collections change by the command line only."""
    if services.live is None:
        return
    routes, one = _Routes(services, services.live), PATH + "/{vector_store_id}"
    add = app.add_api_route
    add(PATH, routes.create, methods=["POST"], response_model=VectorStoreObject, responses=ERRORS)
    add(PATH, routes.list_stores, response_model=ListReply[VectorStoreObject], responses=ERRORS)
    add(one, routes.get, response_model=VectorStoreObject, responses=ERRORS)
    add(one, routes.update, methods=["POST"], response_model=VectorStoreObject, responses=ERRORS)
    add(one, routes.delete, methods=["DELETE"], response_model=VectorStoreDeleted, responses=ERRORS)
    add(one + "/search", routes.search, methods=["POST"], response_model=SearchResults, responses=ERRORS)


@dataclass(frozen=True)
class _Routes:
    services: Services
    live: LiveCollections

    async def create(self, body: CreateVectorStore, request: Request) -> Response:
        """Makes a collection; its files are ingested in the background."""
        stores, attachments = self.live.library.vector_stores, body.attachments()
        store = await self.services.preparation.run(
            stores.create, owner_of(request), body.settings(), self.live.made_with, attachments
        )
        if attachments:
            self.live.ingestion.wake()
        return json_response(vector_store_object(store))

    async def list_stores(self, request: Request, query: Annotated[ListQuery, Query()]) -> Response:
        stores = self.live.library.vector_stores
        page = await self.services.preparation.run(stores.page, owner_of(request), query.request())
        return json_response(list_reply(page, vector_store_object))

    async def get(self, request: Request, vector_store_id: str) -> Response:
        stores = self.live.library.vector_stores
        store = await self.services.preparation.run(stores.get, vector_store_id, owner_of(request))
        return json_response(vector_store_object(store))

    async def update(self, body: UpdateVectorStore, request: Request, vector_store_id: str) -> Response:
        """Changes what the request mentions; null takes it back."""
        run, stores, owner = self.services.preparation.run, self.live.library.vector_stores, owner_of(request)
        old = await run(stores.get, vector_store_id, owner)
        store = await run(stores.update, vector_store_id, owner, body.settings(old.settings))
        return json_response(vector_store_object(store))

    async def delete(self, request: Request, vector_store_id: str) -> Response:
        """Removes the collection. The uploaded files stay."""
        stores = self.live.library.vector_stores
        await self.services.preparation.run(stores.delete, vector_store_id, owner_of(request))
        return json_response(VectorStoreDeleted(id=vector_store_id))

    async def search(self, body: SearchRequest, request: Request, vector_store_id: str) -> Response:
        """The passages that fit the query best."""
        record_of(request).collection = vector_store_id
        search, condition = body.search(self.services.rag.search), body.filter()
        reply = await self.services.preparation.run(
            self._found, vector_store_id, owner_of(request), body.query, search, condition
        )
        return json_response(reply)

    def _found(
        self, store: str, owner: str, queries: list[str], search: SearchConfig, condition: Filter | None
    ) -> SearchResults:
        stores = self.live.library.vector_stores
        stores.use(store, owner)
        best: dict[str, ScoredChunk] = {}
        for query in dict.fromkeys(queries):
            for hit in self.live.retriever.search(store, query, search, condition):
                known = best.setdefault(hit.chunk.chunk_id, hit)
                if hit.score > known.score:
                    best[hit.chunk.chunk_id] = hit
        hits = sorted(best.values(), key=lambda hit: -hit.score)[: search.top_k]
        return search_results(queries, hits, stores.cited(store, {hit.chunk.document_id for hit in hits}))
