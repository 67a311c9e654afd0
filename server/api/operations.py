"""/health and /metrics: what machines ask."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from server import metrics
from server.api.common import ERRORS
from server.errors import ServerError, reply_for
from server.services import Services, record_of


def add_routes(app: FastAPI, services: Services) -> None:
    async def health(request: Request) -> Response:
        """200 while requests are served; 503 with the reason otherwise. Needs no key, so it tells no more."""
        try:
            services.worker.check_ready()
        except ServerError as error:
            return reply_for(error, record_of(request).request_id).response()
        return Response('{"status":"ready"}', media_type="application/json")

    async def read_metrics() -> Response:
        return Response(services.metrics.exposition(), headers={"Content-Type": metrics.CONTENT_TYPE})

    app.add_api_route("/health", health, responses=ERRORS)
    app.add_api_route("/metrics", read_metrics, responses=ERRORS)
