"""/v1/models: the language model, and the embedding model that collections are searched with."""

from __future__ import annotations

from fastapi import FastAPI, Response

from server.api.common import ERRORS, json_response
from server.errors import ModelUnknown
from server.replies.models import ModelCard, ModelList
from server.services import Services


def add_routes(app: FastAPI, services: Services) -> None:
    rag = services.rag
    cards = [ModelCard(id=rag.model_name, created=services.created, max_model_len=rag.max_model_len)]
    if rag.embedder is not None:
        cards.append(ModelCard(id=rag.embedder.name, created=services.created))

    async def list_models() -> Response:
        return json_response(ModelList(data=cards))

    async def get_model(model: str) -> Response:
        for card in cards:
            if card.id == model:
                return json_response(card)
        names = " and ".join(repr(card.id) for card in cards)
        raise ModelUnknown(f"no model {model!r} here; this server has {names}")

    app.add_api_route("/v1/models", list_models, response_model=ModelList, responses=ERRORS)
    # a model's name may be a path
    app.add_api_route("/v1/models/{model:path}", get_model, response_model=ModelCard, responses=ERRORS)
