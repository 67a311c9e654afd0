"""Rows attention of many rows on Hopper GPUs: the tiles and the result of `rows_attention`, other machinery.

One program is three groups of warps. The producer, one warp, has the copy engine bring keys and values into a ring of
shared memory; two consumers, four warps each, take the upper and the lower half of the tile's rows. While one consumer
is busy with the softmax, the other one has its products run on the matrix units.

Written in Gluon, Triton's lower level, in which a program says where each number lives. Where this one cannot run
(other GPUs, fp32, windows, few rows, head sizes other than 64 and 128) `rows_attention` has its own kernel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from fusionrag.kernels.backend import INTERPRETED, LOG2_E, has_wgmma, jit_with

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7 renamed it
except (ImportError, AttributeError):  # no Triton, or one whose experimental parts are others
    gluon = gl = None

log = logging.getLogger(__name__)
IS_WANTED = os.environ.get("FUSIONRAG_HOPPER_KERNEL") != "0"  # a way out: what hangs cannot be tried out
BLOCK_M, BLOCK_N = 128, 128
HALF_M = BLOCK_M // 2  # rows of one consumer: what one matrix instruction takes
STAGES = {64: 3, 128: 2}  # of the ring, by head size: what shared memory holds
TOLERANCE = 0.05  # of averages of numbers of size 1 in half precision; a wrong mask or order is off by much more
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24  # of a thread, of the 65,536 that a multiprocessor has


def takes(device: torch.device, dtype: torch.dtype, head_dim: int, window: int | None) -> bool:
    """Whether `attend` runs for a plan of these."""
    can_run = IS_WANTED and gluon is not None and not INTERPRETED and has_wgmma(device)
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim in STAGES and window is None
    return can_run and fits and _works(device, dtype, head_dim)


@cache
def _works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Tried once: Gluon is experimental, and another Triton may read it otherwise."""
    wrong = try_out(attend, device, dtype, head_dim)
    if wrong:
        log.warning("the Hopper kernel of rows attention is left out, the slower one serves: %s", wrong)
    return not wrong


def try_out(function: Callable[..., None], device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What is wrong with `function`, which has the arguments of `attend`; empty if it is right on a small case."""
    draw, num_keys, num_before = torch.Generator().manual_seed(0), 700, 5
    positions = torch.arange(3, num_keys, 3)
    rows = len(positions)
    sizes = (rows, 6), (2, num_before + num_keys), (2, num_before + num_keys)
    queries, keys, values = (torch.randn(*size, head_dim, generator=draw).to(device, dtype) for size in sizes)
    tiles = torch.tensor([[0, rows, pair] for pair in range(0, 3 * rows, BLOCK_M)], dtype=torch.int32)
    on_device = [x.to(device) for x in (positions, positions + num_before, tiles)]
    seen = torch.arange(num_before + num_keys) - num_before <= positions[:, None]
    seen[:, :num_before] = False
    scores = queries.transpose(0, 1).float() @ keys.float().repeat_interleave(3, 0).transpose(1, 2) * head_dim**-0.5
    weights = scores.masked_fill_(~seen.to(device), float("-inf")).softmax(-1)
    expected = (weights @ values.float().repeat_interleave(3, 0)).transpose(0, 1)
    out = torch.zeros_like(queries)
    try:
        function(queries, keys, values, *on_device, head_dim**-0.5, out, None)
    except Exception as error:  # whatever a compiler raises for a language that it does not know
        return f"it does not run here ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
    worst = float((out.float() - expected).abs().max())
    return "" if worst <= TOLERANCE else f"it differs from plain torch by {worst:.3g}"


def takes_layout(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the copy engine can address them: the slots of all heads must be rows of one table, 16 bytes aligned."""
    return keys.stride() == values.stride() and all(
        x.stride(0) % x.stride(1) == 0 and x.stride(1) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
        for x in (keys, values)
    )


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    tiles: torch.Tensor,
    scaling: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """As `rows_attention`. tiles: of BLOCK_M pairs."""
    num_kv_heads, _, head_dim = keys.shape
    _attend_kernel[(len(tiles) * num_kv_heads,)](
        queries, _descriptor(keys), _descriptor(values), out, lse, positions, slots, tiles,
        *queries.stride()[:2], *out.stride()[:2], keys.stride(0) // keys.stride(1), num_kv_heads, scaling * LOG2_E,
        GROUP=queries.shape[1] // num_kv_heads, HEAD_DIM=head_dim, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        STAGES=STAGES[head_dim], HAS_LSE=lse is not None, CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4,
    )  # fmt: skip


def _descriptor(x: torch.Tensor) -> Any:
    """x: (G, S, D). The rows of all heads as one table, to be copied BLOCK_N at a time."""
    num_heads, num_slots, head_dim = x.shape
    num_rows = (num_heads - 1) * (x.stride(0) // x.stride(1)) + num_slots
    kind = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([BLOCK_N, head_dim], kind)
    return TensorDescriptor(x, [num_rows, head_dim], [x.stride(1), 1], [BLOCK_N, head_dim], layout)


@jit_with(gluon)
def _weigh(
    scores, top, total, own, first_key, scale, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr, IS_MASKED: gl.constexpr
):
    """One step of the running softmax: weights, and what the sums so far have to be multiplied with."""
    if IS_MASKED:
        keys = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        scores = gl.where(own[:, None] >= keys[None, :], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_top[:, None])
    kept = gl.exp2(top - new_top)
    return weights, new_top, total * kept + gl.sum(weights, 1), kept


@jit_with(gluon)
def _step(
    block, queries, keys, values, key_full, key_free, value_full, value_free, acc, weights, top, total, own, scale,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, IS_MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of this block, while the weights of the one before meet its values."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    half: gl.constexpr = queries.shape[0]
    stage, before = block % STAGES, (block - 1) % STAGES
    zeros = gl.zeros([half, BLOCK_N], gl.float32, layout=score_layout)
    mbarrier.wait(key_full.index(stage), (block // STAGES) & 1)
    pending_scores = warpgroup_mma(queries, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(value_full.index(before), ((block - 1) // STAGES) & 1)
    pending_acc = warpgroup_mma(weights, values.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(pending_scores,))
    barrier()  # all warps have read the keys
    mbarrier.arrive(key_free.index(stage), count=1)
    fresh, top, total, kept = _weigh(scores, top, total, own, block * BLOCK_N, scale, BLOCK_N, score_layout, IS_MASKED)
    fresh = gl.convert_layout(fresh.to(weights.dtype), weights.type.layout)
    # ptxas moves this wait in front of the softmax, so only the other consumer's products overlap with it. A store of
    # `total` to shared memory and a barrier before the wait keep it here; whether that pays has not been measured.
    acc, weights, fresh = warpgroup_mma_wait(0, deps=(pending_acc, weights, fresh))
    barrier()  # all warps have read the values
    mbarrier.arrive(value_free.index(before), count=1)
    acc = acc * gl.convert_layout(kept, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, fresh, top, total


@jit_with(gluon)
def _consume(
    queries, keys, values, key_full, key_free, value_full, value_free, out, lse, positions,
    first_row, stop_row, first_pair, kv_head, num_heads, stride_or, stride_oh, scale, num_full, num_blocks, last,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_LSE: gl.constexpr,
    OFFSET: gl.constexpr,
):  # fmt: skip
    """Rows [OFFSET, OFFSET + 64) of the tile: blocks that all rows see, blocks behind them, the last values."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    half: gl.constexpr = queries.shape[0] // 2
    kind: gl.constexpr = queries.dtype
    queries = queries.slice(OFFSET, half)
    pairs = first_pair + OFFSET + gl.arange(0, half, layout=row_layout)
    rows = first_row + pairs // GROUP
    own = gl.load(positions + rows, mask=rows < stop_row, other=0).to(gl.int32)
    top = gl.full([half], float("-inf"), gl.float32, layout=row_layout)
    total = gl.zeros([half], gl.float32, layout=row_layout)
    acc = gl.zeros([half, HEAD_DIM], gl.float32, layout=acc_layout)

    mbarrier.wait(key_full.index(0), 0)
    zeros = gl.zeros([half, BLOCK_N], gl.float32, layout=score_layout)
    scores = warpgroup_mma(queries, keys.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    barrier()
    mbarrier.arrive(key_free.index(0), count=1)
    weights, top, total, _ = _weigh(scores, top, total, own, 0, scale, BLOCK_N, score_layout, True)
    weights = gl.convert_layout(weights.to(kind), weight_layout)
    for block in range(1, num_full):
        acc, weights, top, total = _step(
            block, queries, keys, values, key_full, key_free, value_full, value_free, acc, weights, top, total,
            own, scale, BLOCK_N, STAGES, False,
        )  # fmt: skip
    for block in range(gl.maximum(num_full, 1), num_blocks):
        acc, weights, top, total = _step(
            block, queries, keys, values, key_full, key_free, value_full, value_free, acc, weights, top, total,
            own, scale, BLOCK_N, STAGES, True,
        )  # fmt: skip

    # behind `last` lies what others left there, and 0 · NaN is NaN; both consumers put the same zeros in
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    stage = (num_blocks - 1) % STAGES
    mbarrier.wait(value_full.index(stage), ((num_blocks - 1) // STAGES) & 1)
    last_values = values.index(stage)
    seen = (num_blocks - 1) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, wide)) <= last
    nothing = gl.full([BLOCK_N, HEAD_DIM], 0.0, kind, layout=wide)
    last_values.store(gl.where(seen[:, None], last_values.load(wide), nothing))
    fence_async_shared()
    barrier()
    acc = warpgroup_mma_wait(0, deps=(warpgroup_mma(weights, last_values, acc, is_async=True),))

    if HAS_LSE:
        at_lse = rows * num_heads + kv_head * GROUP + pairs % GROUP
        gl.store(lse + at_lse, (top + gl.log2(total)) / 1.4426950408889634, mask=rows < stop_row)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, acc_layout))[:, None]
    pairs = first_pair + OFFSET + gl.arange(0, half, layout=gl.SliceLayout(1, acc_layout))
    rows, heads = first_row + pairs // GROUP, kv_head * GROUP + pairs % GROUP
    at = rows.to(gl.int64)[:, None] * stride_or + heads[:, None] * stride_oh
    at_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, acc_layout))
    gl.store(out + at + at_d[None, :], acc.to(kind), mask=(rows < stop_row)[:, None])


@jit_with(gluon)
def _produce(
    key_table, value_table, keys, values, key_full, key_free, value_full, value_free, first_slot, num_blocks,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for block in range(num_blocks):
        stage, round_ = block % STAGES, block // STAGES
        mbarrier.wait(key_free.index(stage), (round_ & 1) ^ 1)
        mbarrier.expect(key_full.index(stage), key_table.block_type.nbytes)
        at = [first_slot + block * BLOCK_N, 0]
        tma.async_copy_global_to_shared(key_table, at, key_full.index(stage), keys.index(stage))
        mbarrier.wait(value_free.index(stage), (round_ & 1) ^ 1)
        mbarrier.expect(value_full.index(stage), value_table.block_type.nbytes)
        tma.async_copy_global_to_shared(value_table, at, value_full.index(stage), values.index(stage))


@jit_with(gluon, "positions", "slots", "lse")
def _attend_kernel(
    queries, key_table, value_table, out, lse, positions, slots, tiles,
    stride_qr, stride_qh, stride_or, stride_oh, rows_per_head, num_kv_heads, scale,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    HAS_LSE: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M (row, query head) pairs of one KV head, all their keys."""
    kind: gl.constexpr = queries.dtype.element_ty
    tile, kv_head = gl.program_id(0) // num_kv_heads, gl.program_id(0) % num_kv_heads
    first_row, stop_row = gl.load(tiles + 3 * tile), gl.load(tiles + 3 * tile + 1)
    first_pair = gl.load(tiles + 3 * tile + 2)
    low_row = first_row + first_pair // GROUP
    high_row = gl.minimum(first_row + (first_pair + BLOCK_M - 1) // GROUP, stop_row - 1)
    lowest, last = gl.load(positions + low_row).to(gl.int32), gl.load(positions + high_row).to(gl.int32)
    slot = gl.load(slots + low_row).to(gl.int32)
    is_real = (slot >= 0).to(gl.int32)  # others only fill up the pass: one block, for nobody
    slot, lowest, last = slot * is_real, lowest * is_real, last * is_real
    first_slot = kv_head * rows_per_head + slot - lowest

    tile_queries = gl.allocate_shared_memory(
        kind, [BLOCK_M, HEAD_DIM], gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], kind)
    )
    keys = gl.allocate_shared_memory(kind, [STAGES, BLOCK_N, HEAD_DIM], key_table.layout)
    values = gl.allocate_shared_memory(kind, [STAGES, BLOCK_N, HEAD_DIM], value_table.layout)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(key_free.index(stage), count=2)  # both consumers
        mbarrier.init(value_full.index(stage), count=1)
        mbarrier.init(value_free.index(stage), count=2)

    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    pairs = first_pair + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, wide))
    rows, heads = first_row + pairs // GROUP, kv_head * GROUP + pairs % GROUP
    at = rows.to(gl.int64)[:, None] * stride_qr + heads[:, None] * stride_qh
    at_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, wide))
    tile_queries.store(gl.load(queries + at + at_d[None, :], mask=(rows < stop_row)[:, None], other=0.0))
    fence_async_shared()
    barrier()

    num_full, num_blocks = (lowest + 1) // BLOCK_N, last // BLOCK_N + 1  # all rows see the first num_full blocks
    gl.warp_specialize(
        [
            (_consume, (
                tile_queries, keys, values, key_full, key_free, value_full, value_free, out, lse, positions,
                first_row, stop_row, first_pair, kv_head, num_kv_heads * GROUP, stride_or, stride_oh, scale,
                num_full, num_blocks, last, GROUP, HEAD_DIM, BLOCK_N, STAGES, HAS_LSE, 0,
            )),
            (_consume, (
                tile_queries, keys, values, key_full, key_free, value_full, value_free, out, lse, positions,
                first_row, stop_row, first_pair, kv_head, num_kv_heads * GROUP, stride_or, stride_oh, scale,
                num_full, num_blocks, last, GROUP, HEAD_DIM, BLOCK_N, STAGES, HAS_LSE, BLOCK_M // 2,
            )),
            (_produce, (
                key_table, value_table, keys, values, key_full, key_free, value_full, value_free, first_slot,
                num_blocks, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
