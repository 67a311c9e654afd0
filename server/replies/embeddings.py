"""Embeddings as OpenAI's clients read them. Knows nothing of how they were computed."""

from __future__ import annotations

import base64
from typing import Literal

from pydantic import BaseModel

from index.types import FloatArray


class Embedding(BaseModel):
    """`embedding`: numbers, or the base64 of little-endian 32-bit floats."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def embedding_list(vectors: FloatArray, model: str, num_tokens: int, as_base64: bool) -> EmbeddingList:
    """vectors: float32 [inputs, dim]."""
    data = [
        Embedding(
            index=i,
            embedding=base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist(),
        )
        for i, vector in enumerate(vectors)
    ]
    return EmbeddingList(
        data=data, model=model, usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    )
