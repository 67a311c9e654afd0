"""Adds to every slot of some chunks what belongs to its chunk: one vector for its keys, rotated to the slot, one for
its values. One pass over the layer's keys and values. Knows nothing of what is added.
"""

from __future__ import annotations

import torch

from fusionrag.kernels.backend import jit, padded, takes, tl, triton
from fusionrag.kernels.prepare_rows import rotate

BLOCK_T = 32  # slots of a program


def shift_(
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
    first_slot: torch.Tensor,
    chunk_of: torch.Tensor,
    key_shift: torch.Tensor,
    value_shift: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """Slot `first_slot + t` gets the shifts of chunk `chunk_of[t]`; where that is -1 it stays as it is.

    arena_keys, arena_values: (G, S, D), one layer of the arena, the last dimension contiguous. first_slot: (1,) int64.
    chunk_of: (T,) int64, each in [-1, C); slots behind the last chunk need not be there. key_shift (before rotation),
    value_shift: (G, C, D) fp32. cos, sin: (T, rotary_dim / 2) fp32 of the slots' positions; all contiguous.
    """
    num_kv_heads, _, head_dim = arena_keys.shape
    if not takes("shift", arena_keys.device, arena_keys.dtype, arena_values.dtype, head_dim=head_dim):
        shift_reference_(arena_keys, arena_values, first_slot, chunk_of, key_shift, value_shift, cos, sin)
        return
    num_tokens, half = cos.shape
    _shift_kernel[(triton.cdiv(num_tokens, BLOCK_T), num_kv_heads)](
        arena_keys, arena_values, chunk_of, key_shift, value_shift, cos, sin,
        *arena_keys.stride()[:2], *arena_values.stride()[:2], first_slot, num_tokens, key_shift.shape[1],
        HALF=half, HEAD_DIM=head_dim, BLOCK_T=BLOCK_T, BLOCK_H=padded(half), BLOCK_D=padded(head_dim),
        BLOCK_REST=padded(max(1, head_dim - 2 * half)), num_warps=4,
    )  # fmt: skip


@jit("num_tokens", "num_chunks")
def _shift_kernel(
    arena_keys, arena_values, chunk_of, key_shift, value_shift, cos, sin,
    stride_kg, stride_ks, stride_vg, stride_vs, first_slot, num_tokens, num_chunks,
    HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T slots of one KV head."""
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]  # (BLOCK_T, 1), as all below
    head = tl.program_id(1).to(tl.int64)
    chunk = tl.load(chunk_of + tokens, mask=tokens < num_tokens, other=-1)
    is_token = chunk >= 0
    slots, source = tl.load(first_slot) + tokens, (head * num_chunks + chunk) * HEAD_DIM
    at_h, at_d = tl.arange(0, BLOCK_H)[None, :], tl.arange(0, BLOCK_D)[None, :]

    target = arena_keys + head * stride_kg + slots * stride_ks
    wanted = is_token & (at_h < HALF)
    row_cos = tl.load(cos + tokens * HALF + at_h, mask=wanted, other=0.0)
    row_sin = tl.load(sin + tokens * HALF + at_h, mask=wanted, other=0.0)
    first = tl.load(key_shift + source + at_h, mask=wanted, other=0.0)
    second = tl.load(key_shift + source + HALF + at_h, mask=wanted, other=0.0)
    kind = arena_keys.dtype.element_ty
    low = tl.load(target + at_h, mask=wanted, other=0.0) + (first * row_cos - second * row_sin).to(kind)
    high = tl.load(target + HALF + at_h, mask=wanted, other=0.0) + (second * row_cos + first * row_sin).to(kind)
    tl.store(target + at_h, low, mask=wanted)
    tl.store(target + HALF + at_h, high, mask=wanted)
    if HEAD_DIM > 2 * HALF:  # dimensions that carry no position
        at_rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        wanted = is_token & (at_rest < HEAD_DIM)
        rest = tl.load(key_shift + source + at_rest, mask=wanted, other=0.0).to(kind)
        tl.store(target + at_rest, tl.load(target + at_rest, mask=wanted, other=0.0) + rest, mask=wanted)

    target = arena_values + head * stride_vg + slots * stride_vs
    wanted = is_token & (at_d < HEAD_DIM)
    shift = tl.load(value_shift + source + at_d, mask=wanted, other=0.0).to(arena_values.dtype.element_ty)
    tl.store(target + at_d, tl.load(target + at_d, mask=wanted, other=0.0) + shift, mask=wanted)


def shift_reference_(
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
    first_slot: torch.Tensor,
    chunk_of: torch.Tensor,
    key_shift: torch.Tensor,
    value_shift: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """Plain torch: same arguments, same result."""
    own = (chunk_of >= 0).nonzero()[:, 0]
    if not len(own):
        return
    begin, end = int(own[0]), int(own[-1]) + 1  # as a rule without a gap; a slice is much faster than an index
    slots, chunk_of = slice(int(first_slot) + begin, int(first_slot) + end), chunk_of[begin:end]
    shifts = rotate(key_shift[:, chunk_of], cos[begin:end], sin[begin:end]), value_shift[:, chunk_of]
    for arena, shift in zip((arena_keys, arena_values), shifts, strict=True):
        arena[:, slots] += shift.to(arena.dtype).masked_fill_((chunk_of < 0)[:, None], 0)
