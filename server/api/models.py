"""/v1/models."""

from __future__ import annotations

from fastapi import FastAPI, Response

from server.api.common import ERRORS, json_response
from server.replies.models import ModelCard, ModelList
from server.services import Services


def add_routes(app: FastAPI, services: Services) -> None:
    rag = services.rag
    card = ModelCard(id=rag.model_name, created=services.created, max_model_len=rag.max_model_len)

    async def list_models() -> Response:
        return json_response(ModelList(data=[card]))

    async def get_model(model: str) -> Response:
        services.check_model(model)
        return json_response(card)

    app.add_api_route("/v1/models", list_models, response_model=ModelList, responses=ERRORS)
    # a model's name may be a path
    app.add_api_route("/v1/models/{model:path}", get_model, response_model=ModelCard, responses=ERRORS)
