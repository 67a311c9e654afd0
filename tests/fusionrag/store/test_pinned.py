"""Blocks of host memory: whoever holds a view of one holds the block, and what nobody holds is given out again."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusionrag.store.pinned import ALIGNMENT, PinnedMemory

SLAB = 8 * ALIGNMENT


def memory(num_slabs: int = 1) -> PinnedMemory:
    return PinnedMemory(num_slabs * SLAB, SLAB, pin=False)


@pytest.mark.parametrize(
    "view",
    [
        lambda block: block,
        lambda block: block[100:200],
        lambda block: block.view(torch.bfloat16).view(-1, 16)[3:],
        lambda block: block.untyped_storage(),
        lambda block: block.numpy()[7:8],
        lambda block: memoryview(block.numpy()),
    ],
    ids=["itself", "slice", "other dtype", "storage", "numpy", "memoryview"],
)
def test_a_block_is_not_given_out_while_anybody_holds_a_view_of_it(view):
    pinned = memory()
    block = pinned.empty(SLAB)
    held = view(block)
    del block
    assert pinned.empty(1) is None
    del held
    assert pinned.empty(SLAB) is not None


def test_blocks_do_not_overlap_and_are_aligned():
    pinned = memory(2)
    blocks = [pinned.empty(n) for n in (1, ALIGNMENT, ALIGNMENT + 1, 5000, 3)]
    for i, block in enumerate(blocks):
        block.fill_(i)
    assert [set(block.tolist()) for block in blocks] == [{i} for i in range(len(blocks))]
    assert [len(block) for block in blocks] == [1, ALIGNMENT, ALIGNMENT + 1, 5000, 3]
    starts = [block.data_ptr() for block in blocks]
    assert {(start - starts[0]) % ALIGNMENT for start in starts} == {0}


@given(order=st.permutations(range(8)))
def test_free_neighbours_join_in_whatever_order_they_come_back(order):
    pinned = memory()
    blocks = {i: pinned.empty(ALIGNMENT) for i in range(8)}
    assert pinned.empty(1) is None
    for i in order:
        assert pinned.empty(SLAB) is None
        del blocks[i]
    assert pinned.empty(SLAB) is not None


def test_a_gap_between_held_blocks_takes_what_fits_and_no_more():
    pinned = memory()
    blocks = [pinned.empty(2 * ALIGNMENT) for _ in range(4)]
    del blocks[1:3]
    assert pinned.empty(4 * ALIGNMENT + 1) is None
    middle = pinned.empty(4 * ALIGNMENT)
    assert blocks[0].data_ptr() < middle.data_ptr() < blocks[1].data_ptr()


@given(sizes=st.lists(st.integers(1, SLAB + ALIGNMENT), max_size=30), num_slabs=st.integers(0, 3))
def test_no_more_is_given_out_than_the_capacity(sizes, num_slabs):
    pinned = memory(num_slabs)
    held = [block for size in sizes if (block := pinned.empty(size)) is not None]
    assert sum(-(-len(block) // ALIGNMENT) * ALIGNMENT for block in held) <= num_slabs * SLAB
    assert all(len(block) <= SLAB for block in held)


def test_a_capacity_is_rounded_up_to_whole_slabs():
    pinned = PinnedMemory(SLAB + 1, SLAB, pin=False)
    assert pinned.empty(SLAB) is not None and pinned.empty(SLAB + 1) is None
    assert PinnedMemory(0, SLAB, pin=False).empty(1) is None


def test_a_block_that_only_the_garbage_collector_can_free_comes_back_without_a_deadlock():
    """Its finalizer may run within `empty` itself, whenever Python chooses to collect."""
    pinned = memory()
    old = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(200):
            cycle = [pinned.empty(SLAB // 2)]
            cycle.append(cycle)
    finally:
        gc.set_threshold(*old)
    del cycle
    gc.collect()
    assert pinned.empty(SLAB) is not None


def test_threads_never_get_the_same_bytes():
    pinned, num_threads = memory(2), 4
    start = threading.Barrier(num_threads)

    def work(number: int) -> int:
        start.wait()
        num_given = 0
        for i in range(200):
            block = pinned.empty(1 + 997 * (i + number) % (SLAB // 2))
            if block is not None:
                num_given += 1
                block.fill_(number)
                assert bool((block == number).all())
        return num_given

    with ThreadPoolExecutor(num_threads) as pool:
        assert min(pool.map(work, range(num_threads))) > 0
    assert pinned.empty(SLAB) is not None and pinned.empty(SLAB) is not None
