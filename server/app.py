"""The application: routes, errors and middleware put together around a rag and the worker that drives its engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from fusionrag.rag import Rag
from index.errors import FusionRAGError
from server.answer import Preparation
from server.api import (
    completions,
    embeddings,
    files,
    models,
    operations,
    page,
    responses,
    vector_store_files,
    vector_stores,
)
from server.config import ServerConfig
from server.errors import reply_for
from server.keys import KeyRing, StoredKeys
from server.live import LiveCollections
from server.loop_lag import LoopLag
from server.metrics import Metrics
from server.middleware import (
    BodyLimits,
    LimitBody,
    LimitConnections,
    LimitHead,
    Recorder,
    RefuseForeignPages,
    RequireKey,
)
from server.services import Services
from server.tracing import tracing
from server.uploads import MAX_FORM_BYTES
from server.worker import Worker

AREAS = (completions, responses, embeddings, models, operations, page, files, vector_stores, vector_store_files)


def create_app(
    rag: Rag,
    worker: Worker,
    config: ServerConfig,
    live: LiveCollections | None = None,
    keys: StoredKeys | None = None,
) -> FastAPI:
    """The ASGI application. Its lifespan starts the worker, and stops it after what runs has been drained.

    Without `live` there are no routes to files and vector stores. `keys` open it beside `config.api_key`.
    """
    preparation = Preparation(rag, config)
    metrics, lag = Metrics(lambda: worker.load), LoopLag()
    metrics.watch_loop(lag)
    if live is not None:
        metrics.watch_ingestion(live.ingestion)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        lag.start()
        try:
            async with nullcontext() if live is None else live.running():
                yield
                await worker.drain(config.drain_timeout_s)
        finally:
            lag.stop()
            worker.stop()
            preparation.close()

    app = FastAPI(
        title="FusionRAG",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # it would quote paths and errors
    )
    services = Services(rag, worker, preparation, metrics, config, live=live)
    for area in AREAS:
        area.add_routes(app, services)
    for kind in (RequestValidationError, HTTPException, FusionRAGError):
        app.add_exception_handler(kind, _reply)
    limits = BodyLimits(config.max_body_bytes, config.body_timeout_s)
    uploads = BodyLimits(config.max_file_bytes + MAX_FORM_BYTES, config.upload_timeout_s)
    app.add_middleware(LimitBody, limits=limits, special={("POST", files.PATH): uploads})
    app.add_middleware(LimitHead, timeout_s=config.request_timeout_s)
    ring = KeyRing(config.api_key, keys)
    app.add_middleware(RefuseForeignPages, keys=ring, hosts=config.host_names)
    app.add_middleware(RequireKey, keys=ring)
    app.add_middleware(LimitConnections)
    app.add_middleware(Recorder, metrics=metrics, tracing=tracing())  # added last: outermost
    return app


async def _reply(request: Request, error: Exception) -> Response:
    return reply_for(error, request.state.record.request_id).response()
