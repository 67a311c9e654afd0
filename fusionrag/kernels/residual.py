"""How far each chunk's recomputed tokens lie from what was stored for them, on average: one pass over those tokens.

Knows nothing of what the mean is used for. Deterministic: one program adds up a chunk's tokens, in their order.
"""

from __future__ import annotations

import torch

from fusionrag.kernels.backend import jit, padded, takes, tl
from fusionrag.kernels.prepare_rows import rotate

BLOCK_R = 64  # rows of a chunk that are looked at together


def mean_residual(
    keys: torch.Tensor,
    values: torch.Tensor,
    span_keys: torch.Tensor,
    span_values: torch.Tensor,
    positions: torch.Tensor,
    bounds: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight · mean over a chunk's rows of (fresh minus stored), keys before rotation; 0 for a chunk without rows.

    keys, values: (G, R, D), fresh, keys not rotated. span_keys, span_values: (G, N, D), what is stored, keys rotated.
    The last dimension is contiguous. positions: (K,) int64 of the first K rows, slot = position. bounds: (C + 1,)
    int64, ascending: rows `[bounds[c], bounds[c + 1])` are chunk c's. cos, sin: (K, rotary_dim / 2) fp32 that undo the
    stored keys' rotation. Returns two tensors (G, C, D) fp32.
    """
    num_kv_heads, num_chunks, head_dim = keys.shape[0], len(bounds) - 1, keys.shape[2]
    if not takes("mean_residual", keys.device, keys.dtype, span_keys.dtype, head_dim=head_dim):
        return mean_residual_reference(keys, values, span_keys, span_values, positions, bounds, cos, sin, weight)
    half = cos.shape[1]
    out = torch.empty(2, num_kv_heads, num_chunks, head_dim, dtype=torch.float32, device=keys.device)
    _mean_residual_kernel[(num_chunks, num_kv_heads, 2)](
        keys, values, span_keys, span_values, positions, bounds, cos, sin, out[0], out[1],
        *keys.stride()[:2], *values.stride()[:2], *span_keys.stride()[:2], *span_values.stride()[:2],
        num_chunks, weight,
        HALF=half, HEAD_DIM=head_dim, BLOCK_R=BLOCK_R, BLOCK_H=padded(half), BLOCK_D=padded(head_dim),
        BLOCK_REST=padded(max(1, head_dim - 2 * half)), num_warps=8,
    )  # fmt: skip
    return out[0], out[1]


@jit("num_chunks", "weight")
def _mean_residual_kernel(
    keys, values, span_keys, span_values, positions, bounds, cos, sin, key_out, value_out,
    stride_kg, stride_kr, stride_vg, stride_vr, stride_skg, stride_sks, stride_svg, stride_svs, num_chunks, weight,
    HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One program: the keys, or the values, of one chunk and one KV head."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, end = tl.load(bounds + chunk), tl.load(bounds + chunk + 1)
    share = weight / tl.maximum(end - begin, 1).to(tl.float32)
    target = (head * num_chunks + chunk) * HEAD_DIM
    if tl.program_id(2) == 0:
        at_h, at_rest = tl.arange(0, BLOCK_H)[None, :], 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        first_sum, second_sum = tl.zeros([BLOCK_H], tl.float32), tl.zeros([BLOCK_H], tl.float32)
        rest_sum = tl.zeros([BLOCK_REST], tl.float32)
        for start in tl.range(begin, end, BLOCK_R):
            rows = (start + tl.arange(0, BLOCK_R))[:, None]
            is_row = rows < end
            slots = tl.load(positions + rows, mask=is_row, other=0)
            fresh = keys + head * stride_kg + rows * stride_kr
            stored = span_keys + head * stride_skg + slots * stride_sks
            wanted = is_row & (at_h < HALF)
            row_cos = tl.load(cos + rows * HALF + at_h, mask=wanted, other=0.0)
            row_sin = tl.load(sin + rows * HALF + at_h, mask=wanted, other=0.0)
            first = tl.load(stored + at_h, mask=wanted, other=0.0).to(tl.float32)
            second = tl.load(stored + HALF + at_h, mask=wanted, other=0.0).to(tl.float32)
            fresh_first = tl.load(fresh + at_h, mask=wanted, other=0.0).to(tl.float32)
            fresh_second = tl.load(fresh + HALF + at_h, mask=wanted, other=0.0).to(tl.float32)
            first_sum += tl.sum(fresh_first - (first * row_cos - second * row_sin), 0)
            second_sum += tl.sum(fresh_second - (second * row_cos + first * row_sin), 0)
            if HEAD_DIM > 2 * HALF:  # dimensions that carry no position
                wanted = is_row & (at_rest < HEAD_DIM)
                fresh_rest = tl.load(fresh + at_rest, mask=wanted, other=0.0).to(tl.float32)
                rest_sum += tl.sum(fresh_rest - tl.load(stored + at_rest, mask=wanted, other=0.0).to(tl.float32), 0)
        flat_h, flat_rest = tl.arange(0, BLOCK_H), 2 * HALF + tl.arange(0, BLOCK_REST)
        tl.store(key_out + target + flat_h, first_sum * share, mask=flat_h < HALF)
        tl.store(key_out + target + HALF + flat_h, second_sum * share, mask=flat_h < HALF)
        if HEAD_DIM > 2 * HALF:
            tl.store(key_out + target + flat_rest, rest_sum * share, mask=flat_rest < HEAD_DIM)
    else:
        at_d, flat_d = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_D)
        value_sum = tl.zeros([BLOCK_D], tl.float32)
        for start in tl.range(begin, end, BLOCK_R):
            rows = (start + tl.arange(0, BLOCK_R))[:, None]
            wanted = (rows < end) & (at_d < HEAD_DIM)
            slots = tl.load(positions + rows, mask=rows < end, other=0)
            fresh = tl.load(values + head * stride_vg + rows * stride_vr + at_d, mask=wanted, other=0.0)
            stored = tl.load(span_values + head * stride_svg + slots * stride_svs + at_d, mask=wanted, other=0.0)
            value_sum += tl.sum(fresh.to(tl.float32) - stored.to(tl.float32), 0)
        tl.store(value_out + target + flat_d, value_sum * share, mask=flat_d < HEAD_DIM)


def mean_residual_reference(
    keys: torch.Tensor,
    values: torch.Tensor,
    span_keys: torch.Tensor,
    span_values: torch.Tensor,
    positions: torch.Tensor,
    bounds: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch: same arguments, same result."""
    rows = torch.arange(len(positions), device=positions.device)
    belongs = (rows >= bounds[:-1, None]) & (rows < bounds[1:, None])
    mean = weight * belongs / belongs.sum(1, keepdim=True).clamp(min=1)  # (C, K); a product: sums in a fixed order
    stored_keys = rotate(span_keys[:, positions].float(), cos, sin)
    key_residual = keys[:, : len(rows)].float() - stored_keys
    value_residual = values[:, : len(rows)].float() - span_values[:, positions].float()
    return torch.matmul(mean, key_residual), torch.matmul(mean, value_residual)
