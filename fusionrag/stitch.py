"""Stored chunk KV → slots of a request's span. The only place that moves keys from storage to positions (I3).

Knows nothing of requests or of where the KV came from.
"""

from __future__ import annotations

import torch

from fusionrag.arena import KVArena
from fusionrag.rope import Rope
from fusionrag.types import AttentionObserver, ChunkKV, RowGroup, Span


@torch.inference_mode()
def place_(arena: KVArena, rope: Rope, span: Span, position: int, kv: ChunkKV) -> None:
    """Writes `kv` at positions `[position, position + T)` of the span: keys rotated once, in fp32; values copied."""
    positions = torch.arange(position, position + kv.num_tokens, device=arena.keys.device)
    cos, sin = rope.tables(positions)
    slots = slice(span.start + position, span.start + position + kv.num_tokens)
    for layer in range(kv.keys.shape[0]):  # layer by layer: the fp32 intermediates stay in cache
        keys = kv.keys[layer].to(arena.keys.device, arena.keys.dtype, non_blocking=True)
        arena.keys[layer, :, slots] = rope.rotate(keys, cos, sin)
        arena.values[layer, :, slots] = kv.values[layer].to(arena.values.dtype)


def rotated(rope: Rope, kv: ChunkKV) -> ChunkKV:
    """`kv` with its keys rotated to positions `[0, T)`, as an arena holds what every prompt begins with."""
    positions = torch.arange(kv.num_tokens, device=kv.keys.device)
    return ChunkKV(rope.rotate(kv.keys, *rope.tables(positions)), kv.values)


class CaptureKV(AttentionObserver):
    """An observer that keeps the un-rotated keys and the values of a group's rows: how stored KV is made."""

    def __init__(self) -> None:
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def before_write(self, layer: int, group: RowGroup, keys: torch.Tensor, values: torch.Tensor) -> None:
        del layer, group
        self._keys.append(keys.clone())
        self._values.append(values.clone())

    def chunk_kv(self) -> ChunkKV:
        """Everything captured so far, (L, G, T, D) on the model's device."""
        return ChunkKV(torch.stack(self._keys), torch.stack(self._values))
