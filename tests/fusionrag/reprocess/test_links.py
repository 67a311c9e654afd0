"""What is carried over equals its definition spelled out: best place in each other chunk, weighed by rarity."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch

from fusionrag.reprocess.links import carried_over, repeated_pairs
from fusionrag.types import PromptChunk, PromptPlan, Segment, SegmentKind


def plan_of(chunks, prefix=(1, 2), tail=(3,)):
    segments, at = [Segment(SegmentKind.PREFIX, 0, tuple(prefix))], len(prefix)
    for i, ids in enumerate(chunks):
        segments.append(Segment(SegmentKind.CHUNK, at, tuple(ids), PromptChunk(str(i), tuple(ids))))
        at += len(ids)
    segments.append(Segment(SegmentKind.TAIL, at, tuple(tail)))
    return PromptPlan(tuple(segments), (at, at + len(tail)))


def spelled_out(importance, plan):
    """Token by token and pair by pair."""
    worth = []  # of each chunk: pair → its best place
    for s in plan.chunks:
        found: dict[tuple[int, int], float] = {}
        for i, pair in enumerate(pairwise(s.token_ids)):
            value = float(importance[s.start + i] + importance[s.start + i + 1])
            found[pair] = max(found.get(pair, 0.0), value)
        worth.append(found)
    carried = [0.0] * len(importance)
    for own, s in enumerate(plan.chunks):
        for i, pair in enumerate(pairwise(s.token_ids)):
            having = sum(pair in found for found in worth)
            others = sum(found.get(pair, 0.0) for other, found in enumerate(worth) if other != own)
            for at in (s.start + i, s.start + i + 1):
                carried[at] += math.log(len(worth) / having) * others / 2
    return torch.tensor(carried)


@pytest.mark.parametrize("num_chunks", [1, 2, 7])
@pytest.mark.parametrize("num_tokens", [1, 2, 25])
def test_carried_importance_equals_the_definition(num_chunks, num_tokens):
    draw = random.Random(num_chunks * num_tokens)
    plan = plan_of([[draw.randrange(6) for _ in range(num_tokens)] for _ in range(num_chunks)])
    importance = torch.rand(plan.num_tokens, generator=torch.Generator().manual_seed(1))
    carried = carried_over(importance, repeated_pairs(plan, importance.device))
    torch.testing.assert_close(carried, spelled_out(importance, plan), rtol=0, atol=1e-5)


def test_a_name_in_two_chunks_carries_and_a_phrase_of_all_chunks_does_not():
    name, phrase = (40, 41), (50, 51)
    plan = plan_of([(*phrase, 10, *name), (*phrase, 11, 12, 13), (14, *name, 15, *phrase)])
    importance = torch.zeros(plan.num_tokens)
    first, _, third = plan.chunks
    importance[first.start : first.stop] = 1.0  # the question matches the first chunk, all of it
    carried = carried_over(importance, repeated_pairs(plan, importance.device))
    assert torch.nonzero(carried)[:, 0].tolist() == [third.start + 1, third.start + 2]


def test_prompts_without_passages_carry_nothing():
    plan = plan_of([])
    carried = carried_over(torch.ones(plan.num_tokens), repeated_pairs(plan, torch.device("cpu")))
    assert not carried.any()


def test_what_is_carried_decides_what_is_recomputed(bench):
    """With all weight on it, only tokens of repeated pairs are taken."""
    chunks = [bench.chunk(text) for text in ("qqqq zxzxzx", "abcdefg", "hijk zxzxzx lmn", "opqr stuv")]
    bench.preprocess(chunks)
    plan = bench.plan(chunks, "zxzxzx")
    counts = {c: bench.prefill(plan, recompute_ratio=0.2, carry=c).stats.chunks[2].num_recomputed for c in (0.0, 10.0)}
    assert counts[10.0] > counts[0.0]
