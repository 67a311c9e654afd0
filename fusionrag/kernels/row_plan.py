"""What the attention of one pass needs to know of its rows: planned once, used by all layers.

For the kernel it is a table of tiles, made from the numbers of rows alone: what depends on positions and slots is read
on the device. So planning never waits, and a captured graph stays right when positions and slots change in place.
For the reference it is a list of blocks with their masks. Knows nothing of layers, chunks or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fusionrag.kernels import rows_attention_hopper
from fusionrag.kernels.backend import has_wgmma, padded, takes

ROWS_PER_BLOCK = 128  # of the reference: large enough for GEMM speed, small enough to skip most keys it cannot see


@dataclass(frozen=True)
class RequestRows:
    """Rows `[first_row, first_row + num_rows)` of a pass belong to one request, which owns this span of arena slots."""

    first_row: int
    num_rows: int
    span_start: int
    span_length: int

    @property
    def stop(self) -> int:
        return self.first_row + self.num_rows


@dataclass(frozen=True)
class RowBlock:
    """Rows `[begin, end)` look at slots `[first_slot, last_slot)`; mask (rows, slots) is None where they see all."""

    begin: int
    end: int
    first_slot: int
    last_slot: int
    mask: torch.Tensor | None
    is_causal: bool = False


@dataclass(frozen=True)
class TileShape:
    """How the kernel cuts the work: `block_m` (row, query head) pairs of one KV head by `block_n` keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowPlan:
    """Row i sees the slots of its own request at positions in `(positions[i] - window, positions[i]]`; None: no limit.

    positions, slots: (R,) int64, ascending within each request; slot - position is where its span starts. They may
        change in place. A row that only fills up a pass of fixed size has slot -1 and the position of the row before
        it, 0 if it is a request's only one; what comes out for it is undefined.
    requests: their rows follow each other.
    tiles: (num_tiles, 3) int32: begin and end of the request's rows, first pair of the tile counted from that begin;
        most keys first, so that no large tile starts last. num_splits: parts that a tile's keys are cut into, so that
        few rows fill the device too. Both for the kernel alone; None where it does not run.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    requests: tuple[RequestRows, ...]
    window: int | None
    dtype: torch.dtype
    group: int  # query heads that share a KV head
    shape: TileShape | None = None
    tiles: torch.Tensor | None = None
    num_splits: int = 1
    is_hopper: bool = False  # the tiles are for `rows_attention_hopper`

    @cached_property
    def blocks(self) -> tuple[RowBlock, ...]:
        """What the reference needs; reads the positions."""
        return tuple(b for r in self.requests for b in _blocks(self, r))


def plan_rows(
    positions: torch.Tensor,
    slots: torch.Tensor,
    requests: Sequence[RequestRows],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int | None = None,
) -> RowPlan:
    """positions, slots: (R,) int64 on the device that will attend. dtype: of queries, keys and values."""
    requests, device, group = tuple(r for r in requests if r.num_rows), positions.device, num_heads // num_kv_heads
    plan = RowPlan(positions, slots, requests, window, dtype, group)
    if not (requests and takes("rows_attention", device, dtype, head_dim=head_dim)):
        return plan
    num_pairs = [r.num_rows * group for r in requests]
    is_hopper = rows_attention_hopper.takes(device, dtype, head_dim, window) and _fills(num_pairs, num_kv_heads, device)
    shape = HOPPER if is_hopper else choose_shape(max(num_pairs), head_dim, dtype, has_wgmma(device))
    tiles = _tiles(requests, group, shape.block_m, device)
    num_keys = max(r.span_length for r in requests)
    num_splits = 1 if is_hopper else _num_splits(len(tiles) * num_kv_heads, min(num_keys, window or num_keys), device)
    return replace(plan, shape=shape, tiles=tiles, num_splits=num_splits, is_hopper=is_hopper)


# Measured on an H100 with 28 query heads over 4, bf16 (`bench kernels`); shared memory of all is below 163 KiB (A100).
HOPPER = TileShape(rows_attention_hopper.BLOCK_M, 64, 8, 3)  # block_n and the rest for the kernel that takes its place
MAX_SPLITS = 32
MIN_KEYS_PER_SPLIT = 256
PROGRAMS_PER_PROCESSOR = 2


def choose_shape(num_pairs: int, head_dim: int, dtype: torch.dtype, has_wgmma: bool) -> TileShape:
    """num_pairs: (row, query head) pairs of the largest request. has_wgmma: the GPU's matrix units read shared memory,
    so that registers are free for larger tiles."""
    is_wide = padded(head_dim) > 128
    if dtype == torch.float32:  # no matrix units in full fp32: registers decide
        return TileShape(16, 32, 4, 2) if is_wide else TileShape(32, 64, 8, 2)
    if num_pairs <= 16:  # decode
        return TileShape(16, 32, 4, 3) if is_wide else TileShape(16, 64, 4, 3)
    if is_wide:
        return TileShape(128, 32, 8, 3) if has_wgmma else TileShape(64, 32, 8, 2)
    return TileShape(64, 64, 4, 3)


def _fills(num_pairs: list[int], num_kv_heads: int, device: torch.device) -> bool:
    """Whether tiles of the Hopper kernel, which does not split keys, give every multiprocessor work, half full."""
    num_tiles = sum(-(-n // HOPPER.block_m) for n in num_pairs)
    return num_tiles * num_kv_heads >= _num_processors(device) and 2 * sum(num_pairs) >= num_tiles * HOPPER.block_m


def _num_processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; elsewhere a few, so that tests on a CPU meet every case."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _num_splits(num_programs: int, num_keys: int, device: torch.device) -> int:
    """Enough parts to give every multiprocessor work, none so small that joining them would cost more."""
    wanted = PROGRAMS_PER_PROCESSOR * _num_processors(device) // num_programs
    return max(1, min(wanted, num_keys // MIN_KEYS_PER_SPLIT, MAX_SPLITS))


def _tiles(requests: Sequence[RequestRows], group: int, block_m: int, device: torch.device) -> torch.Tensor:
    """(num_tiles, 3) int32. Rows ascend, so the share of the span a tile sees grows along its request.

    Made on the device: a table from the host would wait for stored KV that is crossing the link.
    """
    tables, weights = [], []
    for r in requests:
        num_pairs = r.num_rows * group
        offsets = torch.arange(0, num_pairs, block_m, dtype=torch.int32, device=device)
        table = torch.empty(len(offsets), 3, dtype=torch.int32, device=device)
        table[:, 0], table[:, 1], table[:, 2] = r.first_row, r.stop, offsets
        tables.append(table)
        weights.append(r.span_length * (offsets + block_m).clamp(max=num_pairs) / num_pairs)
    if len(tables) == 1:
        return tables[0].flip(0)
    return torch.cat(tables)[torch.cat(weights).argsort(descending=True)]


def _blocks(plan: RowPlan, request: RequestRows) -> list[RowBlock]:
    begin, num_rows, start, window = request.first_row, request.num_rows, request.span_start, plan.window
    positions = plan.positions[begin : request.stop]
    ends = [*positions[ROWS_PER_BLOCK - 1 :: ROWS_PER_BLOCK].tolist(), int(positions[-1])]
    first, last = int(positions[0]), ends[-1]
    if first == 0 and last == num_rows - 1 and (window is None or num_rows <= window):  # dense prefill
        return [RowBlock(begin, begin + num_rows, start, start + num_rows, None, is_causal=num_rows > 1)]
    if num_rows == 1:
        first_key = 0 if window is None else max(0, last + 1 - window)
        return [RowBlock(begin, begin + 1, start + first_key, start + last + 1, None)]
    blocks = []
    for block, offset in enumerate(range(0, num_rows, ROWS_PER_BLOCK)):
        own = positions[offset : offset + ROWS_PER_BLOCK]
        num_keys = ends[block] + 1
        mask = _causal_mask(own, num_keys, window, plan.dtype)
        blocks.append(RowBlock(begin + offset, begin + offset + len(own), start, start + num_keys, mask))
    return blocks


def _causal_mask(positions: torch.Tensor, num_keys: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """(R, num_keys), 0 where a row may look and -inf elsewhere."""
    keys = torch.arange(num_keys, device=positions.device)
    hidden = keys[None, :] > positions[:, None]
    if window is not None:
        hidden |= keys[None, :] <= positions[:, None] - window
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))
