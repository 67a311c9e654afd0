"""Attention of arbitrary rows of one request over its span: the one attention primitive of the project.

Serves full prefill (all positions), selective recompute (some), probe (the tail's) and decode (one). Knows nothing of
layers, chunks or requests.

Cost: a block of rows only touches keys up to its last position, so ascending rows do about the causal half of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

ROWS_PER_BLOCK = 128  # large enough for GEMM speed, small enough to skip most keys a block cannot see


@dataclass(frozen=True)
class RowBlock:
    """Rows `[begin, end)` look at keys `[first_key, num_keys)`; mask (rows, keys) is None where they see them all."""

    begin: int
    end: int
    first_key: int
    num_keys: int
    mask: torch.Tensor | None
    is_causal: bool = False


def plan_rows(positions: torch.Tensor, dtype: torch.dtype, window: int | None = None) -> tuple[RowBlock, ...]:
    """What `rows_attention` needs to know of the positions (R,), ascending: the same for all layers of a pass.

    dtype: of the queries. window: None for full attention.
    """
    num_rows = positions.shape[0]
    ends = [*positions[ROWS_PER_BLOCK - 1 :: ROWS_PER_BLOCK].tolist(), int(positions[-1])]
    first, last = int(positions[0]), ends[-1]
    if first == 0 and last == num_rows - 1 and (window is None or num_rows <= window):  # dense prefill
        return (RowBlock(0, num_rows, 0, num_rows, None, is_causal=num_rows > 1),)
    if num_rows == 1:
        return (RowBlock(0, 1, 0 if window is None else max(0, last + 1 - window), last + 1, None),)
    blocks = []
    for block, begin in enumerate(range(0, num_rows, ROWS_PER_BLOCK)):
        end = min(begin + ROWS_PER_BLOCK, num_rows)
        num_keys = ends[block] + 1
        blocks.append(RowBlock(begin, end, 0, num_keys, _causal_mask(positions[begin:end], num_keys, window, dtype)))
    return tuple(blocks)


def rows_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scaling: float,
    window: int | None = None,
    blocks: Sequence[RowBlock] | None = None,
) -> torch.Tensor:
    """Row i attends to the slots j with `positions[i] - window < j <= positions[i]`.

    queries: (H, R, D), rotated. keys, values: (G, N, D), rotated, slot j = position j; H is a multiple of G.
    positions: (R,) int64, ascending, each < N. scaling: factor on the scores. window: None for full attention.
    blocks: `plan_rows(positions, queries.dtype, window)`, to be planned once for many calls.
    Returns (H, R, D) in the dtype of `queries`.
    """
    out = torch.empty_like(queries)
    for b in plan_rows(positions, queries.dtype, window) if blocks is None else blocks:
        out[:, b.begin : b.end] = scaled_dot_product_attention(
            queries[None, :, b.begin : b.end],
            keys[None, :, b.first_key : b.num_keys],
            values[None, :, b.first_key : b.num_keys],
            attn_mask=b.mask,
            is_causal=b.is_causal,
            scale=scaling,
            enable_gqa=queries.shape[0] != keys.shape[0],
        )[0]
    return out


def _causal_mask(positions: torch.Tensor, num_keys: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """(R, num_keys), 0 where a row may look and -inf elsewhere."""
    slots = torch.arange(num_keys, device=positions.device)
    hidden = slots[None, :] > positions[:, None]
    if window is not None:
        hidden |= slots[None, :] <= positions[:, None] - window
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))
