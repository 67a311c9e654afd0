"""Links whose passages have changed since: which ones, and what stands in their place."""

from __future__ import annotations

import pytest

from scripts.evaluation.datasets import Passage
from scripts.evaluation.neighbours import outdated

PASSAGES = [Passage(f"Title {i}", f"Text of passage {i}.") for i in range(200)]
RELATED = {p: (PASSAGES[i - 1], PASSAGES[i - 7]) for i, p in enumerate(PASSAGES)}


def changed(stale_share: float, seed: int = 0) -> set[Passage]:
    """The passages that are linked no more as they are now."""
    found = outdated(RELATED, stale_share, seed)
    return {now for p in PASSAGES for now, then in zip(RELATED[p], found[p], strict=True) if now != then}


def test_nothing_changed_leaves_every_link_and_everything_changed_leaves_none():
    assert outdated(RELATED, 0.0) == RELATED
    assert changed(1.0) == set(PASSAGES)


def test_the_share_is_met_and_a_smaller_one_is_part_of_a_larger():
    assert len(changed(0.3)) == pytest.approx(60, abs=20)
    assert changed(0.1) < changed(0.3) < changed(1.0)
    assert changed(0.3) == changed(0.3) != changed(0.3, seed=1)


def test_a_passage_that_changed_is_the_same_old_one_for_every_chunk_behind_it():
    found = outdated(RELATED, 0.3)
    for now in changed(0.3):
        old = {then for p in PASSAGES for new, then in zip(RELATED[p], found[p], strict=True) if new == now}
        (then,) = old
        assert then.title == now.title and then.text != now.text and then not in RELATED
