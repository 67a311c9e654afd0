"""Attention of arbitrary rows over the spans of their requests: the one attention primitive of the project.

Serves full prefill (all positions), selective recompute (some), probe (the tail's) and decode (one a request), mixed in
one pass. Knows nothing of layers or chunks.

Cost: a tile of rows only touches keys up to its last position, so ascending rows do about the causal half of the work.
A tile holds all query heads of a KV head for a few rows that follow each other, so a key is fetched once for the group,
and the keys that only some rows of a tile see, where scores are masked, are few.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from fusionrag.kernels import rows_attention_hopper
from fusionrag.kernels.backend import LOG2_E, jit, padded, takes, tl
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
    dimension is contiguous, other strides are free. plan: `plan_rows` for these shapes. scaling: positive.
    out: (R, H, D), made if None. lse: (R, H) fp32, filled if given with the natural log of the sum of exp(scores).
    Returns out, in the dtype of `queries`.
    """
    if plan.tiles is None or not takes("rows_attention", queries.device, queries.dtype, keys.dtype, values.dtype):
        return rows_attention_reference(queries, keys, values, plan, scaling, out, lse)
    assert scaling > 0 and queries.dtype == keys.dtype == values.dtype
    assert queries.stride(2) == keys.stride(2) == values.stride(2) == 1
    out = queries.new_empty(queries.shape) if out is None else out
    _launch(queries, keys, values, plan, scaling, out, lse)
    return out


def _launch(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: RowPlan,
    scaling: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    assert plan.tiles is not None and plan.shape is not None
    if plan.is_hopper and rows_attention_hopper.takes_layout(keys, values):
        rows = plan.positions, plan.slots, plan.tiles
        rows_attention_hopper.attend(queries, keys, values, *rows, scaling, out, lse)
        return
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads, shape, splits = keys.shape[0], plan.shape, plan.num_splits
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty(splits, num_rows, num_heads, head_dim, dtype=torch.float32, device=out.device)
        part_lse = torch.empty(splits, num_rows, num_heads, dtype=torch.float32, device=out.device)
    _rows_attention_kernel[(len(plan.tiles) * num_kv_heads, splits)](
        queries, keys, values, parts, part_lse, plan.positions, plan.slots, plan.tiles,
        *queries.stride()[:2], *keys.stride()[:2], *values.stride()[:2], *parts.stride()[-3:-1], parts.stride(0),
        num_rows, num_kv_heads, scaling * LOG2_E, plan.window or 0,
        GROUP=plan.group, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=shape.block_m, BLOCK_N=shape.block_n,
        HAS_WINDOW=plan.window is not None, HAS_LSE=part_lse is not None, IS_SPLIT=splits > 1,
        PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    if splits > 1:
        _join_splits_kernel[(num_rows, num_heads)](
            parts, part_lse, out, lse, *out.stride()[:2], num_rows, num_heads, splits,
            HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_S=32, HAS_LSE=lse is not None, num_warps=4,
        )  # fmt: skip


@jit()
def _attend(
    acc, top, total, queries, own, key_tile, value_tile, begin, end, last, stride_ks, stride_vs, scale, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds keys `[begin, end)` to the running softmax of a tile. own: (BLOCK_M,) positions of its rows.

    acc: (BLOCK_M, BLOCK_D). top: largest score so far, in powers of two; total: Σ 2^(score - top). Without a mask all
    keys up to `end`, rounded up to a block, are seen by all rows.
    """
    at_n, at_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    key_offsets = at_n[:, None] * stride_ks + at_d[None, :]
    value_offsets = at_n[:, None] * stride_vs + at_d[None, :]
    inside = (at_d < HEAD_DIM)[None, :]
    key_tile += begin.to(tl.int64) * stride_ks
    value_tile += begin.to(tl.int64) * stride_vs
    for start in tl.range(begin, end, BLOCK_N):
        wanted = inside
        if IS_MASKED:
            wanted = inside & ((start + at_n) <= last)[:, None]  # behind `last` lies what others left there
        keys = tl.load(key_tile + key_offsets, mask=wanted, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if IS_MASKED:
            behind = own[:, None] - (start + at_n)[None, :]
            seen = behind >= 0
            if HAS_WINDOW:
                seen = seen & (behind < window)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        base = new_top
        if IS_MASKED:
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
        weights = tl.exp2(scores * scale - base[:, None])
        kept = tl.exp2(top - base)
        total = total * kept + tl.sum(weights, 1)
        values = tl.load(value_tile + value_offsets, mask=wanted, other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * kept[:, None], input_precision=PRECISION)
        top = new_top
        key_tile += BLOCK_N * stride_ks
        value_tile += BLOCK_N * stride_vs
    return acc, top, total


@jit("positions", "slots", "lse", "num_rows", "window")
def _rows_attention_kernel(
    queries, keys, values, out, lse, positions, slots, tiles,
    stride_qr, stride_qh, stride_kg, stride_ks, stride_vg, stride_vs, stride_or, stride_oh, stride_split,
    num_rows, num_kv_heads, scale, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_LSE: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M (row, query head) pairs of one KV head, all their keys or one split of them."""
    tile, kv_head, split = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads, tl.program_id(1)
    first_row, stop_row = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
    first_pair = tl.load(tiles + 3 * tile + 2)
    low_row = first_row + first_pair // GROUP
    high_row = tl.minimum(first_row + (first_pair + BLOCK_M - 1) // GROUP, stop_row - 1)
    lowest, last = tl.load(positions + low_row), tl.load(positions + high_row)
    slot = tl.load(slots + low_row)
    if slot < 0:  # rows that only fill up the pass
        return
    span_start = slot - lowest
    lowest, last = lowest.to(tl.int32), last.to(tl.int32)

    pairs = first_pair + tl.arange(0, BLOCK_M)
    rows, heads = first_row + pairs // GROUP, kv_head * GROUP + pairs % GROUP
    is_row = rows < stop_row
    own = tl.load(positions + rows, mask=is_row, other=0).to(tl.int32)
    at_d = tl.arange(0, BLOCK_D)
    inside = is_row[:, None] & (at_d < HEAD_DIM)[None, :]
    tile_queries = tl.load(
        queries + rows.to(tl.int64)[:, None] * stride_qr + heads[:, None] * stride_qh + at_d[None, :], inside, other=0.0
    )
    key_tile = keys + kv_head.to(tl.int64) * stride_kg + span_start * stride_ks
    value_tile = values + kv_head.to(tl.int64) * stride_vg + span_start * stride_vs

    begin, seen_from, seen_until = (
        lowest * 0,
        lowest * 0,
        (lowest + 1) // BLOCK_N * BLOCK_N,
    )  # all rows see [seen_from, seen_until)
    if HAS_WINDOW:
        begin = tl.maximum(lowest - window + 1, 0) // BLOCK_N * BLOCK_N
        seen_from = tl.minimum(tl.maximum(last - window + BLOCK_N, 0) // BLOCK_N * BLOCK_N, seen_until)
        seen_from = tl.maximum(seen_from, begin)
    end = last + 1
    if IS_SPLIT:
        share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), tl.num_programs(1)) * BLOCK_N
        begin += split * share
        end = tl.minimum(end, begin + share)
        seen_from = tl.minimum(tl.maximum(seen_from, begin), end)
        seen_until = tl.maximum(tl.minimum(seen_until, end), seen_from)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_WINDOW:
        acc, top, total = _attend(
            acc, top, total, tile_queries, own, key_tile, value_tile, begin, seen_from, last, stride_ks, stride_vs,
            scale, window, HEAD_DIM, BLOCK_D, BLOCK_N, True, True, PRECISION,
        )  # fmt: skip
        begin = seen_from
    acc, top, total = _attend(
        acc, top, total, tile_queries, own, key_tile, value_tile, begin, seen_until, last, stride_ks, stride_vs,
        scale, window, HEAD_DIM, BLOCK_D, BLOCK_N, False, HAS_WINDOW, PRECISION,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, tile_queries, own, key_tile, value_tile, seen_until, end, last, stride_ks, stride_vs,
        scale, window, HEAD_DIM, BLOCK_D, BLOCK_N, True, HAS_WINDOW, PRECISION,
    )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)  # a split may hold no key of a row
    acc = acc / total[:, None]
    if IS_SPLIT:
        out += split.to(tl.int64) * stride_split
    at = rows.to(tl.int64)[:, None] * stride_or + heads[:, None] * stride_oh + at_d[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    if HAS_LSE:
        at_lse = (split * num_rows + rows) * num_kv_heads * GROUP + heads
        tl.store(lse + at_lse, (top + tl.log2(total)) / 1.4426950408889634, mask=is_row)


@jit("lse", "num_rows", "num_splits")
def _join_splits_kernel(
    parts, part_lse, out, lse, stride_or, stride_oh, num_rows, num_heads, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """One program: one row and head. parts: (splits, R, H, D) fp32, each normalised; part_lse: (splits, R, H)."""
    row, head = tl.program_id(0), tl.program_id(1)
    acc = tl.zeros([BLOCK_D], tl.float32)
    top, total = float("-inf"), 0.0
    at_d = tl.arange(0, BLOCK_D)
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        at = (splits.to(tl.int64) * num_rows + row) * num_heads + head
        own = tl.load(part_lse + at, mask=splits < num_splits, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(own, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(own - base)
        kept = tl.exp(top - base)
        wanted = (own > float("-inf"))[:, None] & (at_d < HEAD_DIM)[None, :]
        part = tl.load(parts + at[:, None] * HEAD_DIM + at_d[None, :], mask=wanted, other=0.0)
        acc = acc * kept + tl.sum(part * weights[:, None], 0)
        total = total * kept + tl.sum(weights, 0)
        top = new_top
    at = row.to(tl.int64) * stride_or + head * stride_oh + at_d
    tl.store(out + at, (acc / total).to(out.dtype.element_ty), mask=at_d < HEAD_DIM)
    if HAS_LSE:
        tl.store(lse + row * num_heads + head, top + tl.log(total))


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
