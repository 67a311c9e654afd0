"""rows_attention against attention spelled out: any rows, any window, grouped heads, more rows than a block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrag.kernels.rows_attention import ROWS_PER_BLOCK, rows_attention


def naive(queries, keys, values, positions, scaling, window):
    """Row by row, head by head, in fp64."""
    per_kv_head = queries.shape[0] // keys.shape[0]
    out = torch.empty(queries.shape, dtype=torch.float64)
    for i, position in enumerate(positions.tolist()):
        begin = 0 if window is None else max(0, position - window + 1)
        for head in range(queries.shape[0]):
            own = slice(begin, position + 1)
            seen_keys = keys[head // per_kv_head, own].double()
            weights = (seen_keys @ queries[head, i].double() * scaling).softmax(0)
            out[head, i] = weights @ values[head // per_kv_head, own].double()
    return out


def inputs(num_heads, num_kv_heads, positions, num_keys, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = 2 * torch.randn(num_heads, len(positions), head_dim, generator=generator)
    keys, values = (2 * torch.randn(num_kv_heads, num_keys, head_dim, generator=generator) for _ in range(2))
    return queries, keys, values, torch.tensor(positions)


def check(tensors, scaling, window, atol=1e-4):
    out = rows_attention(*tensors, scaling, window)
    torch.testing.assert_close(out.double(), naive(*tensors, scaling, window), rtol=0, atol=atol)


@st.composite
def cases(draw):
    num_keys = draw(st.integers(1, 40))
    positions = sorted(draw(st.sets(st.integers(0, num_keys - 1), min_size=1)))
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    window = draw(st.none() | st.integers(1, 50))
    return inputs(num_kv_heads * group, num_kv_heads, positions, num_keys, seed=draw(st.integers(0, 99))), window


@given(cases(), st.sampled_from([0.1, 0.35, 1.0]))
@settings(max_examples=80)
def test_any_rows_attend_to_all_up_to_themselves(case, scaling):
    tensors, window = case
    check(tensors, scaling, window)


@pytest.mark.parametrize("window", [None, 1, 5, 12, 13])
@pytest.mark.parametrize("num_rows", [1, 2, 12])
def test_dense_prefill_with_free_slots_behind_it(num_rows, window):
    check(inputs(6, 2, list(range(num_rows)), 20), 0.35, window)


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("position", [0, 6, 7, 29])
def test_one_row_anywhere(position, window):
    check(inputs(6, 2, [position], 30), 0.35, window)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("num_rows", [ROWS_PER_BLOCK - 1, ROWS_PER_BLOCK, ROWS_PER_BLOCK + 1, 2 * ROWS_PER_BLOCK + 3])
def test_more_rows_than_a_block(num_rows, step, window):
    positions = [5 + step * i for i in range(num_rows)]
    check(inputs(2, 1, positions, positions[-1] + 9, head_dim=4), 0.5, window)


def test_rows_in_pieces_give_what_they_give_at_once():
    tensors = inputs(6, 2, [i + i // 6 for i in range(600)], 700)
    queries, keys, values, positions = tensors
    at_once = rows_attention(*tensors, 0.35)
    pieces = [
        rows_attention(queries[:, cut], keys, values, positions[cut], 0.35)
        for cut in (slice(0, 3), slice(3, 400), slice(400, 600))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), at_once, rtol=0, atol=1e-5)


def test_what_a_row_may_not_see_does_not_matter():
    queries, keys, values, positions = inputs(6, 2, [3, 4, 9], 12)
    expected = rows_attention(queries, keys, values, positions, 0.35, 3)
    for hidden in (0, 5, 6, 10, 11):  # out of every row's window, and behind all rows
        keys[:, hidden], values[:, hidden] = 1e4, -1e4
    assert torch.equal(rows_attention(queries, keys, values, positions, 0.35, 3), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_stay_near(dtype):
    *tensors, positions = inputs(6, 2, [0, 2, 3, 8, 11], 12)
    halves = [x.to(dtype) for x in tensors]
    out = rows_attention(*halves, positions, 0.35)
    assert out.dtype == dtype
    plain = naive(*halves, positions, 0.35, None)
    tolerance = 4 * torch.finfo(dtype).eps * float(plain.abs().max())
    torch.testing.assert_close(out.double(), plain, rtol=0, atol=tolerance)


def test_writes_nothing():
    tensors = inputs(6, 2, [1, 5, 6], 9)
    before = [x.clone() for x in tensors]
    rows_attention(*tensors, 0.35, 3)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
