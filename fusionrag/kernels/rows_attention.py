"""Attention of arbitrary rows of one request over its span: the one attention primitive of the project.

Serves full prefill (all positions), selective recompute (some), probe (the tail's) and decode (one). Knows nothing of
layers, chunks or requests.

Cost: a block of rows only touches keys up to its last position, so ascending rows do about the causal half of the work.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

ROWS_PER_BLOCK = 256  # large enough for full GEMM speed, small enough to skip most keys a block cannot see


def rows_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """Row i attends to the slots j with `positions[i] - window < j <= positions[i]`.

    queries: (H, R, D), rotated. keys, values: (G, N, D), rotated, slot j = position j; H is a multiple of G.
    positions: (R,) int64, ascending, each < N. scaling: factor on the scores. window: None for full attention.
    Returns (H, R, D) in the dtype of `queries`.
    """
    num_rows = queries.shape[1]
    first, last = int(positions[0]), int(positions[-1])
    if first == 0 and last == num_rows - 1 and (window is None or num_rows <= window):  # dense prefill
        return _attend(queries, keys[:, :num_rows], values[:, :num_rows], scaling, None, is_causal=num_rows > 1)
    if num_rows == 1:
        begin = 0 if window is None else max(0, last + 1 - window)
        return _attend(queries, keys[:, begin : last + 1], values[:, begin : last + 1], scaling, None)
    out = torch.empty_like(queries)
    ends = positions[ROWS_PER_BLOCK - 1 :: ROWS_PER_BLOCK].tolist()
    for block, begin in enumerate(range(0, num_rows, ROWS_PER_BLOCK)):
        rows = slice(begin, min(begin + ROWS_PER_BLOCK, num_rows))
        visible = (ends[block] if block < len(ends) else last) + 1
        mask = _causal_mask(positions[rows], visible, window)
        out[:, rows] = _attend(queries[:, rows], keys[:, :visible], values[:, :visible], scaling, mask)
    return out


def _causal_mask(positions: torch.Tensor, num_keys: int, window: int | None) -> torch.Tensor:
    """(R, num_keys) bool, True where a row may look."""
    slots = torch.arange(num_keys, device=positions.device)
    mask = slots[None, :] <= positions[:, None]
    if window is not None:
        mask &= slots[None, :] > positions[:, None] - window
    return mask


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    is_causal: bool = False,
) -> torch.Tensor:
    return scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=queries.shape[0] != keys.shape[0],
    )[0]
