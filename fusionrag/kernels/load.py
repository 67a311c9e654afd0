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
from typing import NamedTuple

import torch

from fusionrag.kernels.backend import jit, padded, takes, tl, to_device, triton
from fusionrag.kernels.prepare_rows import rotate

INT4_GROUP = 32
BLOCK_T = 16  # tokens of a program: a part of INT4_GROUP
HEADS_PER_PROGRAM = 8  # (layer, head) pairs that share the work of cos and sin
STAGES_OF_ENCODED = 3  # pairs on their way at once; plain numbers, twice the bytes or more, do as well with one


class ChunkBytes(NamedTuple):
    """Where one chunk's bytes lie in the source, and where they go.

    kv, key_scales, value_scales: byte offset of layer 0; the first two are multiples of 16, the last of 4. The scales'
    are ignored where the codec has none. slot, position: of the first token.
    """

    kv: int
    key_scales: int
    value_scales: int
    num_tokens: int
    slot: int
    position: int


def load_table(chunks: Sequence[ChunkBytes], device: torch.device) -> torch.Tensor:
    """(C, 6) int64 on `device`, on its way there without waiting."""
    return to_device(torch.tensor(chunks, dtype=torch.int64).view(-1, 6), device)


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
    first_layer: int = 0,
) -> None:
    """Writes all chunks of `table` into the arena.

    source: (n,) uint8, its start aligned to 16 bytes. table: (C, 6) int64 from `load_table`. max_tokens: of any of its
    chunks. dtype: of the stored numbers where the codec is none. inv_freq: (rotary_dim / 2,) fp32.
    arena_keys, arena_values: (L, G, S, D), the layers that are loaded; the last dimension is contiguous. first_layer:
    the number of the first of them among those stored.
    """
    num_layers, num_heads, _, head_dim = arena_keys.shape
    stored = torch.float16 if codec == "float16" else dtype
    if not takes("load", source.device, stored, arena_keys.dtype, head_dim=head_dim):
        load_reference_(
            source, table, max_tokens, codec, dtype, inv_freq, rope_scaling, arena_keys, arena_values, first_layer
        )
    elif len(table):
        assert head_dim % 2 == 0 and codec in ("none", "float16", "int8", "int4")
        half, num_tiles = len(inv_freq), triton.cdiv(max_tokens, BLOCK_T)
        grid = len(table) * num_tiles, triton.cdiv(num_layers * num_heads, HEADS_PER_PROGRAM)
        _load_kernel[grid](
            source, table, inv_freq, arena_keys, arena_values, rope_scaling,
            num_tiles, first_layer, num_layers, num_heads, *arena_keys.stride()[:3], *arena_values.stride()[:3],
            CODEC="none" if codec == "float16" else codec, STORED=getattr(tl, str(stored).removeprefix("torch.")),
            HEAD_DIM=head_dim, HALF=half, BLOCK_T=BLOCK_T, BLOCK_H=padded(half), BLOCK_V=padded(head_dim // 2),
            BLOCK_REST=padded(max(1, head_dim - 2 * half)), GROUP=INT4_GROUP, HEADS=HEADS_PER_PROGRAM,
            STAGES=1 if codec in ("none", "float16") else STAGES_OF_ENCODED, num_warps=4,
        )  # fmt: skip


@jit()
def _cos_sin(angles):
    """cos and sin of angles below 2^21, off by 1e-7: reduced to an eighth of a turn, then two polynomials.

    Why not the library's: they also reduce what no position reaches, and took as long as all the rest of a tile.
    """
    shifted = angles * 0.6366197723675814 + 12582912.0  # 1.5 · 2^23 rounds to whole quarters of a turn
    quarters = shifted - 12582912.0
    rest = tl.fma(quarters, -1.5703125, angles)  # a quarter turn in three parts: the first two products leave no error
    rest = tl.fma(quarters, -4.837512969970703125e-4, rest)
    rest = tl.fma(quarters, -7.549789948768648e-8, rest)
    square = rest * rest
    odd = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * rest + rest
    even = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    even = even * square * square - 0.5 * square + 1.0
    quarter = shifted.to(tl.int32, bitcast=True)
    is_swapped = (quarter & 1) != 0
    cos, sin = tl.where(is_swapped, odd, even), tl.where(is_swapped, even, odd)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    return cos, tl.where((quarter & 2) != 0, -sin, sin)


@jit()
def _stored_numbers(
    source, kv_at, scales_at, pair, is_value, begin, places, num_tokens, num_heads, is_token,
    CODEC: tl.constexpr, STORED: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    """Channels [FIRST, FIRST + COUNT) of a tile's keys or values of one (layer, head) pair: (BLOCK_T, BLOCK) fp32.

    The tile is tokens `begin + places`. What changes with the pair is added up outside of tensors.
    """
    channels = FIRST + tl.arange(0, BLOCK)[None, :]
    in_range = channels < FIRST + COUNT
    wanted = is_token & in_range if COUNT < BLOCK else is_token
    row = ((pair // num_heads * 2 + is_value) * num_heads + pair % num_heads).to(tl.int64) * num_tokens + begin
    scales = source + scales_at
    if CODEC == "int4":
        middle: tl.constexpr = HEAD_DIM // 2
        if FIRST % middle + BLOCK <= middle:  # one half of bytes that follow each other, which the other half reads too
            in_byte = FIRST % middle + tl.arange(0, BLOCK)[None, :]
            packed = tl.load(source + kv_at + row * middle + (places * middle + in_byte), mask=wanted, other=0)
            packed = packed >> 4 if middle <= FIRST else packed & 15
        else:
            in_byte = channels % middle
            packed = tl.load(source + kv_at + row * middle + (places * middle + in_byte), mask=wanted, other=0)
            packed = (packed >> (channels // middle * 4).to(tl.uint8)) & 15
        numbers = packed.to(tl.float32)
        halves = scales.to(tl.pointer_type(tl.float16))
        if OF_VALUES:
            per_token: tl.constexpr = (HEAD_DIM + GROUP - 1) // GROUP
            distance = num_tokens * per_token
            at = halves + (pair * 2).to(tl.int64) * distance + begin * per_token + FIRST // GROUP + places * per_token
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
            at = halves + (pair * 2).to(tl.int64) * distance + begin // GROUP * HEAD_DIM + channels
            scale = tl.load(at, mask=in_range, other=0.0).to(tl.float32)
            numbers = numbers * scale + tl.load(at + distance, mask=in_range, other=0.0).to(tl.float32)
        return numbers
    if CODEC == "int8":
        eighths = (source + kv_at).to(tl.pointer_type(tl.int8)) + row * HEAD_DIM
        numbers = tl.load(eighths + (places * HEAD_DIM + channels), mask=wanted, other=0).to(tl.float32)
        floats = scales.to(tl.pointer_type(tl.float32))
        if OF_VALUES:
            return numbers * tl.load(floats + pair.to(tl.int64) * num_tokens + begin + places, mask=is_token, other=0.0)
        return numbers * tl.load(floats + pair.to(tl.int64) * HEAD_DIM + channels, mask=in_range, other=0.0)
    plain = (source + kv_at).to(tl.pointer_type(STORED)) + row * HEAD_DIM
    return tl.load(plain + (places * HEAD_DIM + channels), mask=wanted, other=0.0).to(tl.float32)


@jit("table", "num_tiles", "first_layer", "num_layers", "num_heads")
def _load_kernel(
    source, table, inv_freq, arena_keys, arena_values, rope_scaling, num_tiles, first_layer, num_layers, num_heads,
    stride_kl, stride_kg, stride_ks, stride_vl, stride_vg, stride_vs,
    CODEC: tl.constexpr, STORED: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_REST: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens of one chunk, HEADS (layer, head) pairs. A tile has one group of int4's keys.

    All that a pair needs is read before any of it is written: memory answers late, and a store ends the reading ahead.
    """
    row = table + tl.program_id(0) // num_tiles * 6
    begin = tl.program_id(0) % num_tiles * BLOCK_T
    num_tokens = tl.load(row + 3).to(tl.int32)
    if begin >= num_tokens:
        return
    # a multiple of 16, but a thread shall load as many numbers at once as it stores: 8
    kv_at = tl.multiple_of(tl.load(row), 16 if CODEC == "none" else 8)
    key_scales_at = tl.multiple_of(tl.load(row + 1), 16 if HEAD_DIM % 8 == 0 else 4)
    value_scales_at = tl.multiple_of(tl.load(row + 2), 4)
    places = tl.arange(0, BLOCK_T)[:, None]
    is_token = begin + places < num_tokens
    first_slot = tl.load(row + 4) + begin
    at_h, at_v = tl.arange(0, BLOCK_H)[None, :], tl.arange(0, BLOCK_V)[None, :]
    at_rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    position = (tl.load(row + 5) + begin + places).to(tl.float32)
    cos, sin = _cos_sin(position * tl.load(inv_freq + at_h, mask=at_h < HALF, other=0.0))
    cos, sin = cos * rope_scaling, sin * rope_scaling
    is_half, is_middle = is_token & (at_h < HALF), is_token & (at_v < HEAD_DIM // 2)
    kind = arena_keys.dtype.element_ty
    stop = tl.minimum(tl.program_id(1) * HEADS + HEADS, num_layers * num_heads)
    for pair in tl.range(tl.program_id(1) * HEADS, stop, num_stages=STAGES):
        pair = tl.cast(pair, tl.int32)
        stored = first_layer * num_heads + pair
        first = _stored_numbers(
            source, kv_at, key_scales_at, stored, 0, begin, places, num_tokens, num_heads, is_token,
            CODEC, STORED, HEAD_DIM, 0, HALF, BLOCK_H, GROUP, False,
        )  # fmt: skip
        second = _stored_numbers(
            source, kv_at, key_scales_at, stored, 0, begin, places, num_tokens, num_heads, is_token,
            CODEC, STORED, HEAD_DIM, HALF, HALF, BLOCK_H, GROUP, False,
        )  # fmt: skip
        if HEAD_DIM > 2 * HALF:
            rest = _stored_numbers(
                source, kv_at, key_scales_at, stored, 0, begin, places, num_tokens, num_heads, is_token,
                CODEC, STORED, HEAD_DIM, 2 * HALF, HEAD_DIM - 2 * HALF, BLOCK_REST, GROUP, False,
            )  # fmt: skip
        low = _stored_numbers(
            source, kv_at, value_scales_at, stored, 1, begin, places, num_tokens, num_heads, is_token,
            CODEC, STORED, HEAD_DIM, 0, HEAD_DIM // 2, BLOCK_V, GROUP, True,
        )  # fmt: skip
        high = _stored_numbers(
            source, kv_at, value_scales_at, stored, 1, begin, places, num_tokens, num_heads, is_token,
            CODEC, STORED, HEAD_DIM, HEAD_DIM // 2, HEAD_DIM // 2, BLOCK_V, GROUP, True,
        )  # fmt: skip
        layer, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
        target = arena_keys + layer * stride_kl + head * stride_kg + first_slot * stride_ks + places * stride_ks
        tl.store(target + at_h, (first * cos - second * sin).to(kind), mask=is_half)
        tl.store(target + HALF + at_h, (second * cos + first * sin).to(kind), mask=is_half)
        if HEAD_DIM > 2 * HALF:
            tl.store(target + at_rest, rest.to(kind), mask=is_token & (at_rest < HEAD_DIM))
        target = arena_values + layer * stride_vl + head * stride_vg + first_slot * stride_vs + places * stride_vs
        tl.store(target + at_v, low.to(kind), mask=is_middle)
        tl.store(target + HEAD_DIM // 2 + at_v, high.to(kind), mask=is_middle)


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
    first_layer: int = 0,
) -> None:
    """Plain torch, chunk by chunk: same arguments, same result."""
    num_layers, num_heads, _, head_dim = arena_keys.shape
    for chunk in (ChunkBytes(*row) for row in table.tolist()):
        assert chunk.num_tokens <= max_tokens
        shape = first_layer + num_layers, num_heads, chunk.num_tokens, head_dim
        keys, values = (x[first_layer:] for x in _stored(source, chunk, codec, dtype, shape))
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
