"""attention_mass against attention weights spelled out."""

from __future__ import annotations

import pytest
import torch

from fusionrag.kernels.importance import attention_mass, attention_mass_reference
from fusionrag.kernels.row_plan import RequestRows, plan_rows
from fusionrag.kernels.rows_attention import rows_attention


def problem(num_rows, num_keys, num_heads=6, num_kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu", before=0):
    """A request whose last `num_rows` of `num_keys` positions are run, behind another one of `before` rows."""
    draw = torch.Generator().manual_seed(num_rows)
    requests = [RequestRows(0, before, 5, before), RequestRows(before, num_rows, before + 9, num_keys)]
    positions = torch.cat([torch.arange(before), torch.arange(num_keys - num_rows, num_keys)]).to(device)
    starts = torch.tensor([5] * before + [before + 9] * num_rows, device=device)
    queries = torch.randn(before + num_rows, num_heads, head_dim, generator=draw).to(device, dtype)
    keys = torch.randn(num_kv_heads, before + 9 + num_keys + 4, head_dim, generator=draw).to(device, dtype)
    plan = plan_rows(positions, positions + starts, requests, num_heads, num_kv_heads, head_dim, dtype)
    lse = torch.empty(queries.shape[:2], device=device)
    rows_attention(queries, keys, keys, plan, 0.3, lse=lse)
    return queries, keys, plan, lse


def spelled_out(queries, keys, first, last, num_rows, before, num_keys):
    """fp64, row by row and head by head."""
    mass = torch.zeros(num_keys, dtype=torch.float64)
    queries, keys = queries.double().cpu(), keys.double().cpu()
    group = queries.shape[1] // keys.shape[0]
    for row in range(first, last):
        seen = num_keys - num_rows + row - before + 1
        for head in range(queries.shape[1]):
            own = keys[head // group, before + 9 : before + 9 + seen]
            mass[:seen] += (own @ queries[row, head] * 0.3).softmax(0)
    return mass


@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 1), (1, 130), (5, 64), (40, 200), (23, 65)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(6, 2, 16), (7, 1, 80), (4, 4, 128)])
@pytest.mark.parametrize("before", [0, 3])
def test_it_is_the_sum_of_the_attention_weights(device, num_rows, num_keys, num_heads, num_kv_heads, head_dim, before):
    queries, keys, plan, lse = problem(
        num_rows, num_keys, num_heads, num_kv_heads, head_dim, device=device, before=before
    )
    rows = (before, before + num_rows)
    expected = spelled_out(queries, keys, *rows, num_rows, before, num_keys)
    for norm in (lse, None):
        mass = attention_mass(queries, keys, plan, rows, num_keys, 0.3, norm)
        assert mass.dtype == torch.float32
        torch.testing.assert_close(mass.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    assert float(mass.sum()) == pytest.approx(num_rows * num_heads, rel=1e-5)


def test_only_the_rows_asked_for_count(device):
    queries, keys, plan, lse = problem(20, 90, device=device)
    parts = [attention_mass(queries, keys, plan, rows, 90, 0.3, lse) for rows in ((0, 7), (7, 20))]
    whole = attention_mass(queries, keys, plan, (0, 20), 90, 0.3, lse)
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_keys_behind_those_asked_for_are_cut_off(device):
    queries, keys, plan, lse = problem(20, 90, device=device)
    whole = attention_mass(queries, keys, plan, (0, 20), 90, 0.3, lse)
    torch.testing.assert_close(attention_mass(queries, keys, plan, (0, 20), 70, 0.3, lse), whole[:70])


def test_it_is_deterministic(device):
    queries, keys, plan, lse = problem(40, 300, device=device)
    first = attention_mass(queries, keys, plan, (0, 40), 300, 0.3, lse)
    assert all(torch.equal(first, attention_mass(queries, keys, plan, (0, 40), 300, 0.3, lse)) for _ in range(3))


def test_error_is_at_most_twice_that_of_plain_torch(device, dtype):
    queries, keys, plan, lse = problem(40, 300, 6, 2, 64, dtype=dtype, device=device)
    exact = spelled_out(queries, keys, 0, 40, 40, 0, 300)
    ours = attention_mass(queries, keys, plan, (0, 40), 300, 0.3, lse)
    plain = attention_mass_reference(queries, keys, plan, (0, 40), 300, 0.3)
    worst, allowed = ((x.double().cpu() - exact).abs().max().item() for x in (ours, plain))
    assert worst <= 2 * allowed + 1e-5


def test_rows_that_fill_up_a_pass_and_other_requests_slots_add_nothing(kernel_device):
    queries, keys, plan, lse = problem(20, 90, device=kernel_device)
    expected = attention_mass(queries, keys, plan, (0, 15), 90, 0.3, lse)
    keys[:, :9], keys[:, 9 + 85 :] = float("nan"), float("nan")  # the 15 rows see 85 slots
    plan.slots[15:], plan.positions[15:], queries[15:] = -1, 84, float("nan")
    assert torch.equal(attention_mass(queries, keys, plan, (0, 20), 90, 0.3, lse), expected)
