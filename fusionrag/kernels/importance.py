"""How much attention some rows of a request pay to each of its slots, without keeping the matrix.

Knows nothing of chunks or of what the mass is used for. Deterministic: one program adds up all that a key receives.
"""

from __future__ import annotations

import torch

from fusionrag.kernels.backend import LOG2_E, jit, padded, takes, tl, triton
from fusionrag.kernels.row_plan import RowPlan


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
    mass = torch.empty(num_keys, dtype=torch.float32, device=keys.device)
    block_m, block_n, num_warps, num_stages = _block_shape(head_dim, keys.dtype)
    _attention_mass_kernel[(triton.cdiv(num_keys, block_n),)](
        queries, keys, lse, mass, plan.positions, plan.slots,
        *queries.stride()[:2], *keys.stride()[:2],
        first, last, num_keys, keys.shape[0], scaling * LOG2_E,
        GROUP=plan.group, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=block_m, BLOCK_N=block_n,
        PRECISION="ieee" if keys.dtype == torch.float32 else "tf32", num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return mass


def _block_shape(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """block_m (row, query head) pairs, block_n keys, warps, stages."""
    if dtype == torch.float32:
        return 32, 32, 4, 2
    return (64, 64, 4, 2) if padded(head_dim) <= 128 else (64, 32, 4, 2)


@jit("positions", "slots", "lse", "mass", "first", "last", "num_keys")
def _attention_mass_kernel(
    queries, keys, lse, mass, positions, slots, stride_qr, stride_qh, stride_kg, stride_ks,
    first, last, num_keys, num_kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys, all heads and rows, added up in a fixed order."""
    key_positions = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_d = tl.arange(0, BLOCK_D)
    inside = (at_d < HEAD_DIM)[None, :]
    span_start = tl.load(slots + first) - tl.load(positions + first)
    newest = tl.load(positions + last - 1)
    key_tile = keys + (span_start + key_positions)[:, None] * stride_ks + at_d[None, :]
    is_key = key_positions <= tl.minimum(newest, num_keys - 1)
    received = tl.zeros([BLOCK_N], tl.float32)
    if tl.program_id(0) * BLOCK_N <= newest:
        for kv_head in range(num_kv_heads):
            head_keys = tl.load(key_tile + tl.cast(kv_head, tl.int64) * stride_kg, is_key[:, None] & inside, other=0.0)
            for pair in range(0, (last - first) * GROUP, BLOCK_M):
                pairs = pair + tl.arange(0, BLOCK_M)
                rows, heads = first + pairs // GROUP, kv_head * GROUP + pairs % GROUP
                is_row = rows < last
                own = tl.load(positions + rows, is_row, other=-1)
                is_row = is_row & (tl.load(slots + rows, is_row, other=-1) >= 0)  # others only fill up the pass
                at = rows.to(tl.int64)[:, None] * stride_qr + heads[:, None] * stride_qh + at_d[None, :]
                some_queries = tl.load(queries + at, is_row[:, None] & inside, other=0.0)
                scores = tl.dot(some_queries, tl.trans(head_keys), input_precision=PRECISION) * scale
                norm = tl.load(lse + rows * num_kv_heads * GROUP + heads, is_row, other=0.0) * 1.4426950408889634
                seen = is_row[:, None] & (own[:, None] >= key_positions[None, :])
                received += tl.sum(tl.where(seen, tl.exp2(scores - norm[:, None]), 0.0), 0)
    tl.store(mass + key_positions, received, mask=key_positions < num_keys)


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
