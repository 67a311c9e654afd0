"""The arena's spans: disjoint, contiguous, first gap that fits, all given back at the end, never twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fusionrag.arena import KVArena
from fusionrag.types import Span

NUM_SLOTS = 40


def new_arena(num_slots=NUM_SLOTS):
    return KVArena(2, 3, 4, num_slots, torch.float32, torch.device("cpu"))


class ArenaMachine(RuleBasedStateMachine):
    """Any requests in any order, against a plain list of who owns which slot."""

    def __init__(self):
        super().__init__()
        self.arena, self.spans, self.owner = new_arena(), [], [None] * NUM_SLOTS

    @rule(length=st.integers(1, NUM_SLOTS + 1))
    def allocate(self, length):
        runs = (i for i in range(NUM_SLOTS - length + 1) if not any(self.owner[i : i + length]))
        first_fit = next(runs, None)
        span = self.arena.allocate(length)
        assert span == (None if first_fit is None else Span(first_fit, length))
        if span is not None:
            self.spans.append(span)
            self.owner[span.start : span.stop] = [span] * length

    @precondition(lambda self: self.spans)
    @rule(data=st.data())
    def free(self, data):
        span = self.spans.pop(data.draw(st.integers(0, len(self.spans) - 1)))
        self.arena.free(span)
        self.owner[span.start : span.stop] = [None] * span.length
        with pytest.raises(AssertionError, match="freed twice"):
            self.arena.free(span)

    @invariant()
    def every_slot_is_free_or_owned_by_one(self):
        assert self.arena.num_free == self.owner.count(None)
        assert sum(span.length for span in self.spans) == NUM_SLOTS - self.arena.num_free

    def teardown(self):
        for span in self.spans:
            self.arena.free(span)
        assert self.arena.allocate(NUM_SLOTS) == Span(0, NUM_SLOTS)  # one gap again


ArenaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestArenaMachine = ArenaMachine.TestCase


def test_a_part_of_a_free_gap_cannot_be_freed():
    arena = new_arena()
    span = arena.allocate(10)
    for wrong in (Span(5, 10), Span(9, 2), Span(30, 5)):
        with pytest.raises(AssertionError, match="freed twice"):
            arena.free(wrong)
    arena.free(span)
    assert arena.num_free == NUM_SLOTS


def test_a_view_is_the_spans_slots_of_one_layer():
    arena = new_arena()
    arena.allocate(5)
    keys, values = arena.view(1, arena.allocate(7))
    assert keys.shape == values.shape == (3, 7, 4)
    keys.fill_(1)
    values.fill_(2)
    assert arena.keys.nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[1, slot] for slot in range(5, 12)]
    assert float(arena.keys.sum()) == 3 * 7 * 4 and float(arena.values.sum()) == 2 * 3 * 7 * 4


def test_a_new_arena_holds_zeros():
    """A masked slot is multiplied by a weight of zero: it must be a number."""
    arena = new_arena()
    assert not arena.keys.any() and not arena.values.any()
