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
from dataclasses import dataclass

import torch

from fusionrag.kernels.backend import jit, padded, takes, tl, to_device, triton
from fusionrag.kernels.prepare_rows import rotate

INT4_GROUP = 32
HEADS_PER_PROGRAM = 8  # (layer, head) pairs that share the work of cos and sin


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
    rows = [(c.kv, c.key_scales, c.value_scales, c.num_tokens, c.slot, c.position) for c in chunks]
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 6)
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
    num_layers, num_heads, _, head_dim = arena_keys.shape
    stored = torch.float16 if codec == "float16" else dtype
    if not takes("load", source.device, stored, arena_keys.dtype, head_dim=head_dim):
        load_reference_(source, table, max_tokens, codec, dtype, inv_freq, rope_scaling, arena_keys, arena_values)
    elif len(table):
        assert head_dim % 2 == 0 and codec in ("none", "float16", "int8", "int4")
        half, num_tiles = len(inv_freq), triton.cdiv(max_tokens, INT4_GROUP)
        grid = len(table) * num_tiles, triton.cdiv(num_layers * num_heads, HEADS_PER_PROGRAM)
        _load_kernel[grid](
            source, table, inv_freq, arena_keys, arena_values, rope_scaling, num_tiles, num_layers, num_heads,
            *arena_keys.stride()[:3], *arena_values.stride()[:3],
            CODEC="none" if codec == "float16" else codec, STORED=getattr(tl, str(stored).removeprefix("torch.")),
            HEAD_DIM=head_dim, HALF=half, BLOCK_T=INT4_GROUP, BLOCK_H=padded(half), BLOCK_V=padded(head_dim // 2),
            BLOCK_REST=padded(max(1, head_dim - 2 * half)), HEADS=HEADS_PER_PROGRAM, num_warps=4,
        )  # fmt: skip


@jit()
def _stored_numbers(
    source, kv_at, scales_at, pair, is_value, tokens, first_token, num_tokens, num_heads, is_token,
    CODEC: tl.constexpr, STORED: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    """Channels [FIRST, FIRST + COUNT) of a tile's keys or values of one (layer, head) pair: (BLOCK_T, BLOCK) fp32."""
    channels = FIRST + tl.arange(0, BLOCK)[None, :]
    wanted = is_token & (channels < FIRST + COUNT)
    row = ((pair // num_heads * 2 + is_value) * num_heads + pair % num_heads).to(tl.int64) * num_tokens + tokens
    scales = source + scales_at
    if CODEC == "int4":
        middle: tl.constexpr = HEAD_DIM // 2
        in_byte = channels % middle
        if middle >= FIRST + BLOCK:  # said in a way that lets loads be wide
            in_byte = channels
        if middle <= FIRST and FIRST + BLOCK <= HEAD_DIM:
            in_byte = channels - middle
        packed = tl.load(source + kv_at + row * middle + in_byte, mask=wanted, other=0)
        numbers = ((packed >> (channels // middle * 4).to(tl.uint8)) & 15).to(tl.float32)
        halves = scales.to(tl.pointer_type(tl.float16))
        if OF_VALUES:
            per_token: tl.constexpr = (HEAD_DIM + GROUP - 1) // GROUP
            distance = num_tokens * per_token
            at = halves + (pair * 2).to(tl.int64) * distance + tokens * per_token + FIRST // GROUP
            if FIRST % GROUP == 0 and COUNT % GROUP == 0 and COUNT == BLOCK:  # whole groups: one scale for each
                at += tl.arange(0, BLOCK // GROUP)[None, :]
                scale = tl.load(at, mask=is_token, other=0.0).to(tl.float32)[:, :, None]
                low = tl.load(at + distance, mask=is_token, other=0.0).to(tl.float32)[:, :, None]
                grouped = tl.reshape(numbers, (numbers.shape[0], BLOCK // GROUP, GROUP))
                numbers = tl.reshape(grouped * scale + low, (numbers.shape[0], BLOCK))
            else:
                at += channels // GROUP - FIRST // GROUP
                scale = tl.load(at, mask=wanted, other=0.0).to(tl.float32)
                numbers = numbers * scale + tl.load(at + distance, mask=wanted, other=0.0).to(tl.float32)
        else:
            distance = tl.cdiv(num_tokens, GROUP) * HEAD_DIM
            at = halves + (pair * 2).to(tl.int64) * distance + first_token // GROUP * HEAD_DIM + channels
            in_range = channels < FIRST + COUNT
            scale = tl.load(at, mask=in_range, other=0.0).to(tl.float32)
            numbers = numbers * scale + tl.load(at + distance, mask=in_range, other=0.0).to(tl.float32)
        return numbers
    if CODEC == "int8":
        eighths = (source + kv_at).to(tl.pointer_type(tl.int8))
        numbers = tl.load(eighths + row * HEAD_DIM + channels, mask=wanted, other=0).to(tl.float32)
        floats = scales.to(tl.pointer_type(tl.float32))
        if OF_VALUES:
            return numbers * tl.load(floats + pair.to(tl.int64) * num_tokens + tokens, mask=is_token, other=0.0)
        in_range = channels < FIRST + COUNT
        return numbers * tl.load(floats + pair.to(tl.int64) * HEAD_DIM + channels, mask=in_range, other=0.0)
    plain = (source + kv_at).to(tl.pointer_type(STORED))
    return tl.load(plain + row * HEAD_DIM + channels, mask=wanted, other=0.0).to(tl.float32)


@jit("table", "num_tiles")
def _load_kernel(
    source, table, inv_freq, arena_keys, arena_values, rope_scaling, num_tiles, num_layers, num_heads,
    stride_kl, stride_kg, stride_ks, stride_vl, stride_vg, stride_vs,
    CODEC: tl.constexpr, STORED: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens of one chunk, HEADS (layer, head) pairs. A tile has one group of int4's keys."""
    row = table + tl.program_id(0) // num_tiles * 6
    begin = tl.program_id(0) % num_tiles * BLOCK_T
    num_tokens = tl.load(row + 3).to(tl.int32)
    if begin >= num_tokens:
        return
    # a multiple of 16, but a thread shall load as many numbers at once as it stores: 8
    kv_at = tl.multiple_of(tl.load(row), 16 if CODEC == "none" else 8)
    key_scales_at, value_scales_at = tl.multiple_of(tl.load(row + 1), 4), tl.multiple_of(tl.load(row + 2), 4)
    tokens = begin + tl.arange(0, BLOCK_T)[:, None]
    is_token = tokens < num_tokens
    slots = tl.load(row + 4) + tokens
    at_h, at_v = tl.arange(0, BLOCK_H)[None, :], tl.arange(0, BLOCK_V)[None, :]
    position = (tl.load(row + 5) + tokens).to(tl.float32)
    angles = position * tl.load(inv_freq + at_h, mask=at_h < HALF, other=0.0)
    cos, sin = tl.cos(angles) * rope_scaling, tl.sin(angles) * rope_scaling
    is_half, is_middle = is_token & (at_h < HALF), is_token & (at_v < HEAD_DIM // 2)
    kind = arena_keys.dtype.element_ty
    for pair in range(tl.program_id(1) * HEADS, tl.minimum(tl.program_id(1) * HEADS + HEADS, num_layers * num_heads)):
        pair = tl.cast(pair, tl.int32)
        layer, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
        target = arena_keys + layer * stride_kl + head * stride_kg + slots * stride_ks
        first = _stored_numbers(
            source, kv_at, key_scales_at, pair, 0, tokens, begin, num_tokens, num_heads, is_token,
            CODEC, STORED, HEAD_DIM, 0, HALF, BLOCK_H, BLOCK_T, False,
        )  # fmt: skip
        second = _stored_numbers(
            source, kv_at, key_scales_at, pair, 0, tokens, begin, num_tokens, num_heads, is_token,
            CODEC, STORED, HEAD_DIM, HALF, HALF, BLOCK_H, BLOCK_T, False,
        )  # fmt: skip
        tl.store(target + at_h, (first * cos - second * sin).to(kind), mask=is_half)
        tl.store(target + HALF + at_h, (second * cos + first * sin).to(kind), mask=is_half)
        if HEAD_DIM > 2 * HALF:
            rest = _stored_numbers(
                source, kv_at, key_scales_at, pair, 0, tokens, begin, num_tokens, num_heads, is_token,
                CODEC, STORED, HEAD_DIM, 2 * HALF, HEAD_DIM - 2 * HALF, BLOCK_REST, BLOCK_T, False,
            )  # fmt: skip
            at_rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
            tl.store(target + at_rest, rest.to(kind), mask=is_token & (at_rest < HEAD_DIM))
        target = arena_values + layer * stride_vl + head * stride_vg + slots * stride_vs
        for part in tl.static_range(2):
            some = _stored_numbers(
                source, kv_at, value_scales_at, pair, 1, tokens, begin, num_tokens, num_heads, is_token,
                CODEC, STORED, HEAD_DIM, part * (HEAD_DIM // 2), HEAD_DIM // 2, BLOCK_V, BLOCK_T, True,
            )  # fmt: skip
            tl.store(target + part * (HEAD_DIM // 2) + at_v, some.to(kind), mask=is_middle)


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
