"""pack: within the budget, decodes first, atomic requests whole, in order of arrival, and always something."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from fusionrag.scheduler import pack


@dataclass(eq=False)
class Waiting:
    num_pending: int
    is_decoding: bool = False
    is_atomic: bool = False


prefilling = st.builds(Waiting, st.integers(0, 80), st.just(False), st.booleans())
decoding = st.just(1).map(lambda n: Waiting(n, is_decoding=True))
requests = st.lists(prefilling | decoding, max_size=12)
budgets = st.integers(16, 64)


@given(requests, budgets)
def test_every_share_is_of_a_request_that_has_so_many_rows_and_none_has_two(requests, budget):
    shares = pack(requests, budget)
    assert all(1 <= share.num_rows <= share.request.num_pending for share in shares)
    assert len({id(share.request) for share in shares}) == len(shares)


@given(requests, budgets)
def test_the_budget_is_respected_but_for_one_atomic_request(requests, budget):
    """It comes first of the prefilling ones, when waiting would not make it smaller."""
    shares = pack(requests, budget)
    total = sum(share.num_rows for share in shares)
    prefills = [share for share in shares if not share.request.is_decoding]
    if total > budget:
        assert len(prefills) == 1 and prefills[0].request.is_atomic


@given(requests, budgets)
def test_every_decoding_request_gets_its_row_first(requests, budget):
    shares = pack(requests, budget)
    num_decoding = sum(r.is_decoding for r in requests)
    assert [share.request for share in shares[:num_decoding]] == [r for r in requests if r.is_decoding]
    assert all(share.num_rows == 1 for share in shares[:num_decoding])
    assert not any(share.request.is_decoding for share in shares[num_decoding:])


@given(requests, budgets)
def test_an_atomic_request_is_run_whole(requests, budget):
    for share in pack(requests, budget):
        if share.request.is_atomic:
            assert share.num_rows == share.request.num_pending


@given(requests, budgets)
def test_prefills_are_served_in_order_of_arrival(requests, budget):
    """Those that get rows are the first that have any, and only the last of them may get less than all."""
    served = [share for share in pack(requests, budget) if not share.request.is_decoding]
    pending = [r for r in requests if r.num_pending and not r.is_decoding]
    assert [share.request for share in served] == pending[: len(served)]
    assert all(share.num_rows == share.request.num_pending for share in served[:-1])


@given(requests, budgets)
def test_something_runs_whenever_anything_is_pending(requests, budget):
    assert bool(pack(requests, budget)) == any(r.num_pending for r in requests)


@given(requests, budgets)
def test_the_budget_is_not_left_unused(requests, budget):
    shares = pack(requests, budget)
    total = sum(share.num_rows for share in shares)
    served = {id(share.request): share.num_rows for share in shares}
    rest = [r for r in requests if r.num_pending > served.get(id(r), 0)]
    if rest and total < budget:
        assert rest[0].is_atomic and rest[0].num_pending > budget - total


@given(st.lists(prefilling, max_size=8), budgets)
def test_all_rows_are_run_in_the_end(requests, budget):
    pending, num_steps = sum(r.num_pending for r in requests), 0
    while shares := pack(requests, budget):
        for share in shares:
            share.request.num_pending -= share.num_rows
        num_steps += 1
    assert not any(r.num_pending for r in requests)
    assert num_steps <= len(requests) + pending // budget
