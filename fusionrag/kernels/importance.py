"""How much attention some rows of a request pay to each of its slots, without keeping the matrix.

Knows nothing of chunks or of what the mass is used for. Deterministic: one program adds up all that a key receives.
"""

from __future__ import annotations

import torch

from fusionrag.kernels.backend import LOG2_E, jit, padded, takes, tl, triton
from fusionrag.kernels.row_plan import RowPlan, TileShape


def attention_mass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    plan: RowPlan,
    rows: tuple[int, int],
    num_keys: int,
    scaling: float,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ over heads and over rows `[first, last)`, of one request, of softmax(scaling · queries · keysᵀ).

    queries: (R, H, D), rotated. keys: (G, S, D), one layer of the arena. plan: of the pass, without a window.
    lse: (R, H) fp32 from `rows_attention`, for the kernel; None: the reference works the softmax out.
    Returns (num_keys,) fp32: entry j is for the slot of position j of that request.
    """
    head_dim = keys.shape[2]
    if lse is None or not takes("attention_mass", keys.device, queries.dtype, keys.dtype, head_dim=head_dim):
        return attention_mass_reference(queries, keys, plan, rows, num_keys, scaling, lse)
    first, last = rows
    num_kv_heads, shape = keys.shape[0], _block_shape(head_dim, keys.dtype)
    parts = torch.empty(num_kv_heads, num_keys, dtype=torch.float32, device=keys.device)
    _attention_mass_kernel[(triton.cdiv(num_keys, shape.block_n), num_kv_heads)](
        queries, keys, lse, parts, plan.positions, plan.slots, *queries.stride()[:2], *keys.stride()[:2],
        first, last, num_keys, scaling * LOG2_E,
        GROUP=plan.group, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=shape.block_m, BLOCK_N=shape.block_n,
        PRECISION="ieee" if keys.dtype == torch.float32 else "tf32",
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    return parts.sum(0)


def _block_shape(head_dim: int, dtype: torch.dtype) -> TileShape:
    if dtype == torch.float32:
        return TileShape(32, 32, 4, 2)
    return TileShape(64, 128, 8, 2) if padded(head_dim) <= 128 else TileShape(64, 64, 4, 2)


@jit("positions", "slots", "lse", "parts", "first", "last", "num_keys")
def _attention_mass_kernel(
    queries, keys, lse, parts, positions, slots, stride_qr, stride_qh, stride_kg, stride_ks,
    first, last, num_keys, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one head, all its rows, added up in a fixed order. parts: (G, num_keys).

    Pairs lie along the scores' rows, of which a thread has few: what belongs to a pair is not held once for each key.
    """
    first_key, kv_head = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    key_positions = first_key + tl.arange(0, BLOCK_N)
    at_d = tl.arange(0, BLOCK_D)
    span_start = tl.load(slots + first) - tl.load(positions + first)
    newest = tl.minimum(tl.load(positions + last - 1), num_keys - 1)
    at_key = kv_head.to(tl.int64) * stride_kg + (span_start + key_positions)[:, None] * stride_ks + at_d[None, :]
    is_key = (key_positions <= newest)[:, None] & (at_d < HEAD_DIM)[None, :]
    head_keys = tl.trans(tl.load(keys + at_key, mask=is_key, other=0.0))
    received = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    num_pairs = (last - first) * GROUP if first_key <= newest else 0
    for pair in range(0, num_pairs, BLOCK_M):
        pairs = pair + tl.arange(0, BLOCK_M)
        rows, heads = first + pairs // GROUP, kv_head * GROUP + pairs % GROUP
        is_row = rows < last
        at = rows.to(tl.int64)[:, None] * stride_qr + heads[:, None] * stride_qh + at_d[None, :]
        some = tl.load(queries + at, mask=is_row[:, None] & (at_d < HEAD_DIM)[None, :], other=0.0)
        norm = tl.load(lse + rows * tl.num_programs(1) * GROUP + heads, mask=is_row, other=0.0) * 1.4426950408889634
        own = tl.load(positions + rows, mask=is_row, other=-1).to(tl.int32)
        is_real = tl.load(slots + rows, mask=is_row, other=-1) >= 0  # others only fill up the pass
        own = tl.where(is_real, own, -1)
        scores = tl.dot(some, head_keys, input_precision=PRECISION) * scale - norm[:, None]
        received += tl.where(own[:, None] >= key_positions[None, :], tl.exp2(scores), 0.0)
    at_part = kv_head.to(tl.int64) * num_keys + key_positions
    tl.store(parts + at_part, tl.sum(received, 0), mask=key_positions < num_keys)


def attention_mass_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    plan: RowPlan,
    rows: tuple[int, int],
    num_keys: int,
    scaling: float,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain torch: same arguments, same result."""
    first, last = rows
    span_start = next(r.span_start for r in plan.requests if r.first_row <= first and last <= r.stop)
    own_queries = queries[first:last].transpose(0, 1)  # (H, rows, D)
    own_keys = keys[:, span_start : span_start + num_keys]
    grouped = own_queries.reshape(keys.shape[0], -1, keys.shape[2])  # (G, H/G * rows, D)
    if lse is not None:  # the norm is not worked out of these scores, so their rounding would not cancel
        grouped, own_keys = grouped.float(), own_keys.float()
    scores = torch.matmul(grouped, own_keys.transpose(1, 2)).float() * scaling
    scores = scores.view(queries.shape[1], last - first, num_keys)
    hidden = torch.arange(num_keys, device=keys.device)[None, :] > plan.positions[first:last, None]
    scores.masked_fill_(hidden, float("-inf"))
    weights = scores.softmax(-1) if lse is None else scores.sub_(lse[first:last].T[:, :, None]).exp_()
    return weights.sum((0, 1))
