"""The application: routes, errors and middleware put together around a rag and the worker that drives its engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from fusionrag.rag import Rag
from index.errors import FusionRAGError
from server.answer import Preparation
from server.api import completions, models, operations
from server.config import ServerConfig
from server.errors import reply_for
from server.metrics import Metrics
from server.middleware import LimitBody, Recorder, RequireKey
from server.services import Services
from server.worker import Worker

AREAS = (completions, models, operations)


def create_app(rag: Rag, worker: Worker, config: ServerConfig) -> FastAPI:
    """The ASGI application. Its lifespan starts the worker, and stops it after what runs has been drained."""
    preparation = Preparation(rag, config)
    metrics = Metrics(lambda: worker.load)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await worker.drain(config.drain_timeout_s)
            worker.stop()
            preparation.close()

    # no interactive pages: they load scripts from elsewhere
    app = FastAPI(title="FusionRAG", lifespan=lifespan, docs_url=None, redoc_url=None)
    services = Services(rag, worker, preparation, metrics, config)
    for area in AREAS:
        area.add_routes(app, services)
    for kind in (RequestValidationError, HTTPException, FusionRAGError):
        app.add_exception_handler(kind, _reply)
    app.add_middleware(LimitBody, max_body_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
    if config.api_key:
        app.add_middleware(RequireKey, api_key=config.api_key)
    app.add_middleware(Recorder, metrics=metrics)  # added last: outermost
    return app


async def _reply(request: Request, error: Exception) -> Response:
    return reply_for(error, request.state.record.request_id).response()
