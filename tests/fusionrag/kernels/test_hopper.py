"""The Hopper kernel is tried before it serves: what is wrong with it is said, and the other kernel serves."""

from __future__ import annotations

import pytest
import torch

from fusionrag.kernels.row_plan import RequestRows, RowPlan
from fusionrag.kernels.rows_attention import rows_attention_reference
from fusionrag.kernels.rows_attention_hopper import STAGES, attend, takes, try_out

CPU = torch.device("cpu")


def right(queries, keys, values, positions, slots, tiles, scaling, out, lse):
    requests = (RequestRows(0, len(positions), int(slots[0] - positions[0]), keys.shape[1] - 5),)
    plan = RowPlan(positions, slots, requests, None, queries.dtype, queries.shape[1] // keys.shape[0])
    rows_attention_reference(queries, keys, values, plan, scaling, out, lse)


def one_key_too_few(queries, keys, values, positions, slots, *rest):
    right(queries, keys, values, positions - 1, slots - 1, *rest)


def of_the_wrong_head(queries, keys, values, *rest):
    right(queries, keys, values.flip(0), *rest)


def writes_nothing(*_):
    pass


def broken(*_):
    raise AttributeError("module 'gluon' has no attribute 'mbarrier'\nand more")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", STAGES)
def test_what_is_right_is_taken(dtype, head_dim):
    assert try_out(right, CPU, dtype, head_dim) == ""


@pytest.mark.parametrize("function", [one_key_too_few, of_the_wrong_head, writes_nothing])
def test_what_is_wrong_is_refused(function):
    assert "differs from plain torch by" in try_out(function, CPU, torch.bfloat16, 64)


def test_what_does_not_run_is_refused_with_its_first_line():
    said = try_out(broken, CPU, torch.bfloat16, 64)
    assert "has no attribute 'mbarrier'" in said and "and more" not in said


def test_it_serves_no_cpu():
    assert not takes(CPU, torch.bfloat16, 64, None)


@pytest.mark.parametrize("head_dim", STAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_right_where_it_runs(gpu, dtype, head_dim):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    assert try_out(attend, torch.device(gpu), dtype, head_dim) == ""
    assert takes(torch.device(gpu), dtype, head_dim, None)
