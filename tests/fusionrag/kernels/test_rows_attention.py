"""rows_attention against attention spelled out: any rows of any requests, any window, grouped heads, every dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrag.kernels.backend import INTERPRETED
from fusionrag.kernels.row_plan import ROWS_PER_BLOCK, RequestRows, plan_rows
from fusionrag.kernels.rows_attention import rows_attention, rows_attention_reference

SCALING = 0.35


class Case:
    """Some requests' rows over one arena. `positions`: of each request; spans lie behind each other, with gaps."""

    def __init__(
        self, positions, num_heads=6, num_kv_heads=2, head_dim=8, window=None, seed=0, dtype=None, device="cpu"
    ):
        draw = torch.Generator().manual_seed(seed)
        requests, slots, row, slot = [], [], 0, 3
        for own in positions:
            length = max(own, default=0) + 5
            requests.append(RequestRows(row, len(own), slot, length))
            slots += [slot + p for p in own]
            row, slot = row + len(own), slot + length + 2
        kind = {"dtype": dtype or torch.float32, "device": device}
        self.queries = (2 * torch.randn(row, num_heads, head_dim, generator=draw)).to(**kind)
        self.keys, self.values = (
            (2 * torch.randn(num_kv_heads, slot, head_dim, generator=draw)).to(**kind) for _ in range(2)
        )
        self.requests, self.window, self.scaling = tuple(requests), window, SCALING
        flat = torch.tensor([p for own in positions for p in own], dtype=torch.int64, device=device)
        self.plan = plan_rows(
            flat,
            torch.tensor(slots, dtype=torch.int64, device=device),
            requests,
            num_heads,
            num_kv_heads,
            head_dim,
            kind["dtype"],
            window,
        )

    def attend(self, attention=rows_attention, **more):
        return attention(self.queries, self.keys, self.values, self.plan, self.scaling, **more)

    def spelled_out(self, dtype=torch.float64):
        """out (R, H, D) and lse (R, H), the matrix of all scores kept, everything in `dtype`."""
        group = self.queries.shape[1] // self.keys.shape[0]
        queries, keys, values = self.queries.to(dtype), self.keys.to(dtype), self.values.to(dtype)
        out, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:2])
        for r in self.requests:
            rows, span = slice(r.first_row, r.stop), slice(r.span_start, r.span_start + r.span_length)
            own_keys, own_values = (x[:, span].repeat_interleave(group, dim=0) for x in (keys, values))
            scores = queries[rows].transpose(0, 1) @ own_keys.transpose(1, 2) * self.scaling  # (H, rows, N)
            behind = self.plan.positions[rows, None] - torch.arange(r.span_length, device=scores.device)
            hidden = (behind < 0) if self.window is None else (behind < 0) | (behind >= self.window)
            scores = scores.masked_fill(hidden, float("-inf"))
            out[rows] = (scores.softmax(-1) @ own_values).transpose(0, 1)
            lse[rows] = scores.logsumexp(-1).T
        return out, lse


def check(case, atol=1e-4):
    """Into poisoned buffers: whatever is not written is noticed."""
    out = torch.full_like(case.queries, float("nan"))
    lse = torch.full(out.shape[:2], float("nan"), device=out.device)
    assert case.attend(out=out, lse=lse) is out
    expected, expected_lse = case.spelled_out()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=atol)
    torch.testing.assert_close(case.attend(), out, rtol=0, atol=0)


@st.composite
def cases(draw):
    requests = draw(st.lists(st.sets(st.integers(0, 39), max_size=20), min_size=1, max_size=3))
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    window, seed = draw(st.none() | st.integers(1, 50)), draw(st.integers(0, 99))
    positions = [sorted(own) for own in requests]
    return {
        "positions": positions,
        "num_heads": num_kv_heads * group,
        "num_kv_heads": num_kv_heads,
        "window": window,
        "seed": seed,
    }


@given(cases())
@settings(max_examples=15 if INTERPRETED else 60)
def test_any_rows_of_any_requests_attend_to_all_up_to_themselves(case):
    check(Case(**case))


@pytest.mark.parametrize("window", [None, 1, 5, 12, 13])
@pytest.mark.parametrize("num_rows", [1, 2, 12])
def test_dense_prefill_with_free_slots_behind_it(device, num_rows, window):
    check(Case([range(num_rows)], window=window, device=device))


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("position", [0, 6, 7, 29, 300])
def test_one_row_anywhere(device, position, window):
    check(Case([[position]], window=window, device=device))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("num_rows", [ROWS_PER_BLOCK - 1, ROWS_PER_BLOCK, ROWS_PER_BLOCK + 1, 2 * ROWS_PER_BLOCK + 3])
def test_more_rows_than_a_block(device, num_rows, step, window):
    check(Case([range(5, 5 + step * num_rows, step)], 2, 1, 16, window, device=device))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_every_head_dim(device, head_dim):
    check(Case([[0, 3, 4, 90, 91, 140], [17]], head_dim=head_dim, device=device))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (7, 1), (8, 8), (9, 3), (28, 4), (32, 2)])
def test_every_grouping_of_heads(device, num_heads, num_kv_heads):
    check(Case([[0, 3, 4, 90, 91, 140], [17]], num_heads, num_kv_heads, device=device))


def test_decode_beside_prefill_beside_recompute(device):
    check(Case([[700], range(50), [], range(3, 400, 7), [0], [520]], device=device))


def test_no_rows_at_all(device):
    case = Case([[], []], device=device)
    assert case.attend().shape == (0, 6, 8)


def test_rows_in_pieces_give_what_they_give_at_once(device):
    positions = [i + i // 6 for i in range(300)]
    at_once = Case([positions], device=device)
    whole = at_once.attend()
    for cut in (slice(0, 3), slice(3, 200), slice(200, 300)):
        own = at_once.plan.positions[cut]
        plan = plan_rows(own, own + 3, [RequestRows(0, len(own), 3, positions[-1] + 5)], 6, 2, 8, torch.float32)
        piece = rows_attention(at_once.queries[cut], at_once.keys, at_once.values, plan, SCALING)
        torch.testing.assert_close(piece, whole[cut], rtol=0, atol=1e-5)


def test_a_row_is_worth_the_same_in_any_company(device):
    together = Case([[90, 91], [7], range(200)], device=device)
    out = together.attend()
    alone = together.requests[0]
    plan = plan_rows(together.plan.positions[:2], together.plan.slots[:2], [alone], 6, 2, 8, torch.float32)
    by_itself = rows_attention(together.queries[:2], together.keys, together.values, plan, SCALING)
    torch.testing.assert_close(by_itself, out[:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_what_a_row_may_not_see_does_not_matter(device, window):
    case = Case([[3, 4, 9]], window=window, device=device)
    expected = case.attend()
    for hidden in (0, 5, 6, 10, 11) if window else (10, 11):  # out of every row's window, and behind all rows
        case.keys[:, 3 + hidden], case.values[:, 3 + hidden] = 1e4, -1e4
    assert torch.equal(case.attend(), expected)


@pytest.mark.parametrize("positions", [[[3, 4, 9]], [range(40)], [[70]]], ids=["some", "dense", "one"])
def test_other_requests_slots_may_hold_anything(kernel_device, positions):
    case = Case(positions, device=kernel_device)
    expected = case.attend()
    last = 3 + max(positions[0])
    for broken in (slice(0, 3), slice(last + 1, None)):
        case.keys[:, broken], case.values[:, broken] = float("nan"), float("nan")
    assert torch.equal(case.attend(), expected)


@pytest.mark.parametrize("head_dim", [64] if INTERPRETED else [64, 128, 256])
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize(
    "positions", [[range(70)], [range(0, 240, 3)], [[555]], [[7, 300], range(40)]], ids=["dense", "some", "one", "two"]
)
def test_error_is_at_most_twice_that_of_plain_torch(device, dtype, head_dim, window, positions):
    case = Case(positions, 6, 2, head_dim, window, dtype=dtype, device=device)
    case.scaling = head_dim**-0.5
    out = case.attend()
    assert out.dtype == dtype
    (exact, lse), plain = case.spelled_out(), case.spelled_out(dtype)[0]
    worst, allowed = ((x.double() - exact).norm(dim=-1).max().item() for x in (out, plain))
    # A score s in fp32 is off by about eps · |s|, and its weight by as much: no order of summing can promise less, and
    # for a single row a library happens to pick one (a tree) that is luckier than adding one product after another.
    rounding = torch.finfo(torch.float32).eps * (4 + lse.abs().max()) * case.values.double().norm(dim=-1).max()
    assert worst <= 2 * allowed + rounding.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(14, 2), (2, 2), (12, 1)])
@pytest.mark.parametrize(
    "positions",
    [[range(2100)], [range(2, 4400, 2)], [range(3, 4400, 2), [4000], range(40)]],
    ids=["dense", "some", "three requests"],
)
def test_many_rows_in_half_precision(gpu, dtype, head_dim, num_heads, num_kv_heads, positions):
    """What a kernel of its own runs on Hopper: error, log-sum-exp, and NaNs in the slots of others."""
    case = Case(positions, num_heads, num_kv_heads, head_dim, dtype=dtype, device=gpu)
    case.scaling = head_dim**-0.5
    for r in case.requests:
        behind = slice(r.span_start + max(positions[case.requests.index(r)]) + 1, r.span_start + r.span_length + 2)
        case.keys[:, behind], case.values[:, behind] = 0, 0  # for the check, which multiplies them with 0
    exact, exact_lse = case.spelled_out()
    allowed = (case.spelled_out(dtype)[0].double() - exact).norm(dim=-1).max()
    for r in case.requests:
        behind = slice(r.span_start + max(positions[case.requests.index(r)]) + 1, r.span_start + r.span_length + 2)
        case.keys[:, behind], case.values[:, behind] = float("nan"), float("nan")
    out = torch.full_like(case.queries, float("nan"))
    lse = torch.full(out.shape[:2], float("nan"), device=gpu)
    case.attend(out=out, lse=lse)
    assert (out.double() - exact).norm(dim=-1).max() <= 2 * allowed
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-4)
    assert torch.equal(case.attend(), out)


def test_many_rows_over_slots_that_the_copy_engine_cannot_address(gpu):
    case = Case([range(2100)], 4, 4, 64, dtype=torch.bfloat16, device=gpu)
    expected = case.attend()
    case.keys, case.values = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (case.keys, case.values))
    torch.testing.assert_close(case.attend(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "positions", [[range(0, 4400, 2)], [range(30), [700]], [[5], [900]]], ids=["many", "few", "decode"]
)
def test_a_captured_graph_follows_positions_slots_and_queries(gpu, positions):
    kind = {"dtype": torch.bfloat16, "head_dim": 64, "device": gpu}
    first, later = Case(positions, **kind), Case([[p + 1 for p in own] for own in positions], seed=1, **kind)
    keys, values = (torch.zeros(2, 9000, 64, dtype=torch.bfloat16, device=gpu) for _ in range(2))
    out, queries = torch.empty_like(first.queries), first.queries.clone()

    def run():
        rows_attention(queries, keys, values, first.plan, SCALING, out=out)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    first_positions, first_slots = first.plan.positions.clone(), first.plan.slots.clone()
    for case, at, slots in ((later, later.plan.positions, later.plan.slots), (first, first_positions, first_slots)):
        keys[:, : case.keys.shape[1]], values[:, : case.keys.shape[1]] = case.keys, case.values
        queries.copy_(case.queries)
        first.plan.positions.copy_(at)
        first.plan.slots.copy_(slots)
        expected = case.attend()
        graph.replay()
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_writes_nothing_but_the_output(device):
    case = Case([[1, 5, 6]], window=3, device=device)
    before = [x.clone() for x in (case.queries, case.keys, case.values, case.plan.positions, case.plan.slots)]
    case.attend()
    after = (case.queries, case.keys, case.values, case.plan.positions, case.plan.slots)
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))


def test_strides_are_free(device):
    case = Case([[1, 5, 60], [9]], head_dim=16, device=device)
    expected = case.attend()
    wide = torch.full((4, 8, 32), float("nan"), device=device)
    wide[:, 1:7, :16] = case.queries
    case.queries = wide[:, 1:7, :16]
    keys = case.keys.transpose(0, 1).contiguous().transpose(0, 1)  # slot by slot, not head by head
    case.keys, out = keys, torch.full((4, 6, 40), float("nan"), device=device)
    assert torch.equal(case.attend(out=out[:, :, 8:24]), expected)
    assert out[:, :, :8].isnan().all() and out[:, :, 24:].isnan().all()


def test_kernel_and_reference_take_the_same_arguments(kernel_device):
    case = Case([range(3, 300, 2), [40]], device=kernel_device)
    torch.testing.assert_close(case.attend(), case.attend(rows_attention_reference), rtol=0, atol=1e-5)


def test_rows_that_fill_up_a_pass_change_nothing(kernel_device):
    """A captured graph has a fixed number of rows; positions and slots change in place, the plan stays."""
    case, other = (Case([range(n), [400], [500]], device=kernel_device) for n in (150, 120))
    positions, slots = case.plan.positions, case.plan.slots
    positions[:120], positions[120:150], positions[150], positions[151] = other.plan.positions[:120], 119, 400, 0
    slots[:120], slots[120:150], slots[150], slots[151] = other.plan.slots[:120], -1, other.plan.slots[120], -1
    queries = torch.cat([other.queries[:120], case.queries[:30], other.queries[120:]])
    out = rows_attention(queries, other.keys, other.values, case.plan, SCALING)
    kept = [*range(120), 150]
    torch.testing.assert_close(out[kept], other.attend()[:121], rtol=0, atol=1e-5)
