"""Small specs and KV that fit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusionrag.store.codec import DTYPES
from fusionrag.types import ChunkKV, KVSpec


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., KVSpec]:
    def make(num_tokens: int = 3, first_id: int = 100, **changes: Any) -> KVSpec:
        fields: dict[str, Any] = {
            "model_fingerprint": "model",
            "dtype": "float32",
            "codec": "none",
            "prefix_ids": (1, 2),
            "chunk_ids": tuple(range(first_id, first_id + num_tokens)),
            "kind": "fused",
            "related": ("a" * 64, "b" * 64),
        }
        return KVSpec(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def make_kv() -> Callable[..., ChunkKV]:
    def make(
        spec: KVSpec, num_layers: int = 2, num_kv_heads: int = 2, head_dim: int = 4, seed: int | None = None
    ) -> ChunkKV:
        """Different for every spec, the same for equal specs."""
        generator = torch.Generator().manual_seed(int(spec.digest[:8], 16) if seed is None else seed)
        shape = (num_layers, num_kv_heads, len(spec.chunk_ids), head_dim)
        keys, values = (torch.randn(shape, generator=generator).to(DTYPES[spec.dtype]) for _ in range(2))
        return ChunkKV(keys, values)

    return make
