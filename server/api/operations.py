"""/health, /ready and /metrics: what machines ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from server import metrics
from server.api.common import ERRORS, json_response
from server.errors import ErrorReply, ServerError, reply_for
from server.services import Services, owner_of, record_of


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    status: Literal["ready"] = "ready"


METRICS_REPLY: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}
}


def add_routes(app: FastAPI, services: Services) -> None:
    routes = _Routes(services)
    app.add_api_route("/health", routes.health, response_model=Health, responses=ERRORS)
    app.add_api_route("/ready", routes.ready, response_model=Readiness, responses=ERRORS)
    app.add_api_route("/metrics", routes.metrics, response_class=Response, responses=METRICS_REPLY | ERRORS)


@dataclass(frozen=True)
class _Routes:
    services: Services

    async def health(self, request: Request) -> Response:
        """Liveness: 503 when only a restart helps. Needs no key, so it tells no more."""
        try:
            self.services.worker.check_alive()
        except ServerError as error:
            return reply_for(error, record_of(request).request_id).response()
        return json_response(Health())

    async def ready(self, request: Request) -> Response:
        """Readiness: 503 while requests are better sent elsewhere, because they would be refused. Needs no key."""
        try:
            self.services.worker.check_ready()
        except ServerError as error:
            return reply_for(error, record_of(request).request_id).response()
        if self._is_full():
            message = "all places in the queue are taken; try again later"
            return ErrorReply(503, message, "server_error", code="queue_full", headers={"Retry-After": "1"}).response()
        return json_response(Readiness())

    async def metrics(self, request: Request) -> Response:
        """Everybody's traffic in Prometheus' text format: for the operator alone."""
        if owner_of(request):
            raise HTTPException(403, "metrics are for the operator, whose key is the server's api_key")
        return Response(self.services.metrics.exposition(), headers={"Content-Type": metrics.CONTENT_TYPE})

    def _is_full(self) -> bool:
        load, limits = self.services.worker.load, self.services.rag.engine.config
        num_requests = load.num_running + load.num_waiting
        return self.services.preparation.is_full or num_requests >= limits.max_queue + limits.max_num_requests
