"""Attention of arbitrary rows over the spans of their requests: the one attention primitive of the project.

Serves full prefill (all positions), selective recompute (some), probe (the tail's) and decode (one a request), mixed in
one pass. Knows nothing of layers or chunks.

Cost: a tile of rows only touches keys up to its last position, so ascending rows do about the causal half of the work.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from fusionrag.kernels.row_plan import RowPlan


def rows_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: RowPlan,
    scaling: float,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scaling · queries · keysᵀ) · values, each row over the slots that the plan lets it see.

    queries: (R, H, D), rotated. keys, values: (G, S, D), one layer of the arena; H is a multiple of G. The last
    dimension is contiguous, other strides are free. plan: `plan_rows` for these shapes.
    out: (R, H, D), made if None. lse: (R, H) fp32, filled if given with the natural log of the sum of exp(scores).
    Returns out, in the dtype of `queries`.
    """
    return rows_attention_reference(queries, keys, values, plan, scaling, out, lse)


def rows_attention_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: RowPlan,
    scaling: float,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain torch: same arguments, same result."""
    out = queries.new_empty(queries.shape) if out is None else out
    is_grouped = queries.shape[1] != keys.shape[0]
    for b in plan.blocks:
        own_queries = queries[b.begin : b.end].transpose(0, 1)[None]  # (1, H, rows, D)
        own_keys, own_values = keys[None, :, b.first_slot : b.last_slot], values[None, :, b.first_slot : b.last_slot]
        attended = scaled_dot_product_attention(
            own_queries, own_keys, own_values, b.mask, is_causal=b.is_causal, scale=scaling, enable_gqa=is_grouped
        )
        out[b.begin : b.end] = attended[0].transpose(0, 1)
        if lse is not None:
            lse[b.begin : b.end] = _log_sum_exp(own_queries[0], own_keys[0], b.mask, b.is_causal, scaling)
    return out


def _log_sum_exp(
    queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scaling: float
) -> torch.Tensor:
    """queries (H, R, D), keys (G, N, D), mask (R, N) → (R, H) fp32."""
    num_heads, num_rows, _ = queries.shape
    grouped = queries.reshape(keys.shape[0], -1, queries.shape[2])
    scores = torch.matmul(grouped.float(), keys.float().transpose(1, 2)).view(num_heads, num_rows, -1) * scaling
    if is_causal:
        scores = scores.masked_fill(scores.new_ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
    return (scores if mask is None else scores + mask.float()).logsumexp(-1).T
