"""How much attention some rows of a request pay to each of its slots, without keeping the matrix.

Knows nothing of chunks or of what the mass is used for. Deterministic: one program adds up all that a key receives.
"""

from __future__ import annotations

import torch

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
    """Σ over heads and over rows `[first, last)` of one request of softmax(scaling · queries · keysᵀ).

    queries: (R, H, D), rotated. keys: (G, S, D), one layer of the arena. plan: of the pass, without a window.
    lse: (R, H) fp32 from `rows_attention`; None: worked out here, by the reference.
    Returns (num_keys,) fp32: entry j is for the slot of position j of that request.
    """
    return attention_mass_reference(queries, keys, plan, rows, num_keys, scaling, lse)


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
    scores = torch.matmul(grouped, own_keys.transpose(1, 2)).float() * scaling
    scores = scores.view(queries.shape[1], last - first, num_keys)
    hidden = torch.arange(num_keys, device=keys.device)[None, :] > plan.positions[first:last, None]
    scores.masked_fill_(hidden, float("-inf"))
    weights = scores.softmax(-1) if lse is None else scores.sub_(lse[first:last].T[:, :, None]).exp_()
    return weights.sum((0, 1))
