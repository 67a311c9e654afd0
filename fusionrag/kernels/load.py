"""Stored KV, as it comes from disk or host memory, into arena slots: one pass over the bytes.

De-quantises, rotates keys to the positions where they now stand, and scatters, for many chunks and several layers in
one launch. All arithmetic is fp32; the result is rounded once. Knows nothing of files, tiers or requests.

How the bytes of one chunk lie (`codec.layout` writes them so), for each tensor the layers one after the other:

    none, float16   kv (L, 2, G, T, D) of the stored dtype; [:, 0] keys, [:, 1] values
    int8            kv int8 as above; key_scales (L, G, 1, D), value_scales (L, G, T, 1) fp32
    int4            kv uint8 (L, 2, G, T, D/2): byte j of a token holds channel j in its low half and channel j + D/2
                    in its high half; key_scales (L, G, 2, ⌈T/32⌉, D), value_scales (L, G, 2, T, ⌈D/32⌉) fp16, where
                    [:, :, 0] are the scales and [:, :, 1] the minima of groups of 32 tokens, or of 32 channels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch

from fusionrag.kernels.backend import to_device
from fusionrag.kernels.prepare_rows import rotate

INT4_GROUP = 32


@dataclass(frozen=True)
class ChunkBytes:
    """Where one chunk's bytes lie in the source, and where they go.

    kv, key_scales, value_scales: byte offset of the first layer that is loaded; `kv` is a multiple of 16, the others of
    4. The scales' are ignored where the codec has none. slot, position: of the first token.
    """

    kv: int
    key_scales: int
    value_scales: int
    num_tokens: int
    slot: int
    position: int


def load_table(chunks: Sequence[ChunkBytes], device: torch.device) -> torch.Tensor:
    """(C, 6) int64 on `device`, on its way there without waiting."""
    table = torch.tensor([astuple(c) for c in chunks], dtype=torch.int64).view(-1, 6)
    return to_device(table, device)


def load_(
    source: torch.Tensor,
    table: torch.Tensor,
    max_tokens: int,
    codec: str,
    dtype: torch.dtype,
    inv_freq: torch.Tensor,
    rope_scaling: float,
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
) -> None:
    """Writes all chunks of `table` into the arena.

    source: (n,) uint8, its start aligned to 16 bytes. table: (C, 6) int64 from `load_table`. max_tokens: of any of its
    chunks. dtype: of the stored numbers where the codec is none. inv_freq: (rotary_dim / 2,) fp32.
    arena_keys, arena_values: (L, G, S, D), the layers that are loaded; the last dimension is contiguous.
    """
    load_reference_(source, table, max_tokens, codec, dtype, inv_freq, rope_scaling, arena_keys, arena_values)


def load_reference_(
    source: torch.Tensor,
    table: torch.Tensor,
    max_tokens: int,
    codec: str,
    dtype: torch.dtype,
    inv_freq: torch.Tensor,
    rope_scaling: float,
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
) -> None:
    """Plain torch, chunk by chunk: same arguments, same result."""
    num_layers, num_heads, _, head_dim = arena_keys.shape
    for chunk in (ChunkBytes(*row) for row in table.tolist()):
        assert chunk.num_tokens <= max_tokens
        keys, values = _stored(source, chunk, codec, dtype, (num_layers, num_heads, chunk.num_tokens, head_dim))
        positions = torch.arange(chunk.position, chunk.position + chunk.num_tokens, device=source.device)
        angles = positions.float()[:, None] * inv_freq
        cos, sin = angles.cos() * rope_scaling, angles.sin() * rope_scaling
        slots = slice(chunk.slot, chunk.slot + chunk.num_tokens)
        arena_keys[:, :, slots] = rotate(keys, cos, sin).to(arena_keys.dtype)
        arena_values[:, :, slots] = values.to(arena_values.dtype)


def _stored(
    source: torch.Tensor, chunk: ChunkBytes, codec: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (L, G, T, D) fp32 of one chunk."""
    num_layers, num_heads, num_tokens, head_dim = shape

    def view(offset: int, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
        num_bytes = torch.Size(sizes).numel() * dtype.itemsize
        # a copy, for a view of another dtype wants its own alignment
        return source[offset : offset + num_bytes].clone().view(dtype).view(sizes)

    if codec == "int8":
        kv = view(chunk.kv, torch.int8, num_layers, 2, num_heads, num_tokens, head_dim)
        key_scales = view(chunk.key_scales, torch.float32, num_layers, num_heads, 1, head_dim)
        value_scales = view(chunk.value_scales, torch.float32, num_layers, num_heads, num_tokens, 1)
        return kv[:, 0].float().mul_(key_scales), kv[:, 1].float().mul_(value_scales)
    if codec == "int4":
        kv = view(chunk.kv, torch.uint8, num_layers, 2, num_heads, num_tokens, head_dim // 2)
        groups = -(-num_tokens // INT4_GROUP)
        key_scales = view(chunk.key_scales, torch.float16, num_layers, num_heads, 2, groups, head_dim)
        groups = -(-head_dim // INT4_GROUP)
        value_scales = view(chunk.value_scales, torch.float16, num_layers, num_heads, 2, num_tokens, groups)
        return dequantize_int4(kv, key_scales, value_scales)
    kv = view(chunk.kv, torch.float16 if codec == "float16" else dtype, num_layers, 2, num_heads, num_tokens, head_dim)
    return kv[:, 0].float(), kv[:, 1].float()


def dequantize_int4(
    kv: torch.Tensor, key_scales: torch.Tensor, value_scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes as at the top of this file → keys and values (L, G, T, D) fp32."""
    numbers = torch.cat((kv & 15, kv >> 4), dim=-1).float()  # (L, 2, G, T, D)
    num_tokens, head_dim = numbers.shape[3:]
    by_token = key_scales.float().repeat_interleave(INT4_GROUP, dim=3)[:, :, :, :num_tokens]
    by_channel = value_scales.float().repeat_interleave(INT4_GROUP, dim=4)[..., :head_dim]
    keys = numbers[:, 0].mul_(by_token[:, :, 0]).add_(by_token[:, :, 1])
    values = numbers[:, 1].mul_(by_channel[:, :, 0]).add_(by_channel[:, :, 1])
    return keys, values
