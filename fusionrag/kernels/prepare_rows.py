"""What happens to a layer's queries, keys and values before attention: rotation, and the write to the arena.

Knows nothing of requests. Rotation is in fp32 by halves: dimension i pairs with i + rotary_dim / 2 (`fusionrag.rope`).
"""

from __future__ import annotations

import torch

from fusionrag.kernels.backend import jit, padded, takes, tl, triton

BLOCK_R = 16  # rows of a program


def prepare_rows_(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
) -> None:
    """Rotates `queries` in place; writes `keys`, rotated, and `values` at their slots.

    queries: (R, H, D). keys, values: (R, G, D). The last dimension is contiguous, other strides are free.
    cos, sin: (R, rotary_dim / 2) fp32, contiguous. slots: (R,) int64; a negative one is not written.
    arena_keys, arena_values: (G, S, D), one layer of the arena.
    """
    num_rows, num_heads, head_dim = queries.shape
    dtypes = (queries.dtype, keys.dtype, arena_keys.dtype)
    if not takes("prepare_rows", queries.device, *dtypes, head_dim=head_dim):
        prepare_rows_reference_(queries, keys, values, cos, sin, slots, arena_keys, arena_values)
    elif num_rows:
        num_kv_heads, half = keys.shape[1], cos.shape[1]
        _prepare_rows_kernel[(triton.cdiv(num_rows, BLOCK_R), num_heads + 2 * num_kv_heads)](
            queries, keys, values, cos, sin, slots, arena_keys, arena_values,
            *queries.stride()[:2], *keys.stride()[:2], *values.stride()[:2],
            *arena_keys.stride()[:2], *arena_values.stride()[:2], num_rows, num_heads, num_kv_heads,
            HALF=half, REST=head_dim - 2 * half, BLOCK_R=BLOCK_R, BLOCK_H=padded(half),
            BLOCK_REST=padded(max(1, head_dim - 2 * half)), num_warps=4,
        )  # fmt: skip


@jit()
def _rotate_rows(
    source, target, cos, sin, wanted, is_target, at_h,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """source, target: pointers to the rows, (BLOCK_R, 1). Rotated in fp32; dimensions behind 2 · HALF are copied."""
    first = tl.load(source + at_h, mask=wanted, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + at_h, mask=wanted, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(target + at_h, (first * cos - second * sin).to(kind), mask=wanted & is_target)
    tl.store(target + HALF + at_h, (second * cos + first * sin).to(kind), mask=wanted & is_target)
    if REST > 0:
        at_rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        wanted = is_target & (at_rest < 2 * HALF + REST)
        tl.store(target + at_rest, tl.load(source + at_rest, mask=wanted).to(kind), mask=wanted)


@jit("slots", "num_rows")
def _prepare_rows_kernel(
    queries, keys, values, cos, sin, slots, arena_keys, arena_values,
    stride_qr, stride_qh, stride_kr, stride_kh, stride_vr, stride_vh,
    stride_akg, stride_aks, stride_avg, stride_avs, num_rows, num_heads, num_kv_heads,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One program: some rows of one query head, of one KV head's keys, or of one KV head's values."""
    head = tl.program_id(1)
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]  # (BLOCK_R, 1), as all below
    is_row = rows < num_rows
    slot = tl.load(slots + rows, mask=is_row, other=-1)
    rows = rows.to(tl.int64)
    at_h = tl.arange(0, BLOCK_H)[None, :]
    wanted = is_row & (at_h < HALF)
    if head < num_heads + num_kv_heads:
        row_cos = tl.load(cos + rows * HALF + at_h, mask=wanted, other=0.0)
        row_sin = tl.load(sin + rows * HALF + at_h, mask=wanted, other=0.0)
        if head < num_heads:
            at = queries + rows * stride_qr + head * stride_qh
            _rotate_rows(at, at, row_cos, row_sin, wanted, is_row, at_h, HALF, REST, BLOCK_REST)
        else:
            head -= num_heads
            source = keys + rows * stride_kr + head * stride_kh
            target = arena_keys + head.to(tl.int64) * stride_akg + slot * stride_aks
            _rotate_rows(source, target, row_cos, row_sin, wanted, slot >= 0, at_h, HALF, REST, BLOCK_REST)
    else:
        head -= num_heads + num_kv_heads
        source = values + rows * stride_vr + head * stride_vh
        target = arena_values + head.to(tl.int64) * stride_avg + slot * stride_avs
        one = tl.full([1, 1], 1.0, tl.float32)
        _rotate_rows(source, target, one, one * 0.0, wanted, slot >= 0, at_h, HALF, REST, BLOCK_REST)


def prepare_rows_reference_(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
) -> None:
    """Plain torch: same arguments, same result; every slot must be one of the arena."""
    queries.copy_(rotate(queries, cos[:, None], sin[:, None]))
    arena_keys.index_copy_(1, slots, rotate(keys, cos[:, None], sin[:, None]).transpose(0, 1))
    arena_values.index_copy_(1, slots, values.transpose(0, 1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: (..., D); cos, sin: broadcast to (..., rotary_dim / 2). A new tensor of x's dtype, rotated in fp32."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if 2 * half < x.shape[-1]:  # partial rotary: the other dimensions carry no position
        out[..., 2 * half :] = x[..., 2 * half :]
    return out.to(x.dtype)
