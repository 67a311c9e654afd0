"""The models that this server has."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


def _is_none(value: object) -> bool:
    return value is None


class ModelCard(BaseModel):
    """`max_model_len`: longest prompt plus answer in tokens; an embedding model has none."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fusionrag"
    max_model_len: int | None = Field(default=None, exclude_if=_is_none)


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
