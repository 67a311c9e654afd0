"""The linear layers of one row against the same spelled out in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, rms_norm, silu

from fusionrag.kernels.one_row import (
    linear_of_row,
    linear_of_row_reference,
    swiglu_of_row,
    swiglu_of_row_reference,
)

EPS = 1e-5
SIZES = [(1, 1), (3, 8), (4, 512), (37, 513), (64, 1024), (129, 2000)]  # outputs, numbers of the row


class Case:
    def __init__(self, num_out, width, dtype=torch.float32, device="cpu", seed=0):
        draw = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=draw).to(device, dtype)

        self.x, self.residual, self.bias = random(1, width), random(1, num_out), random(num_out)
        self.weight, self.up, self.norm = random(num_out, width), random(num_out, width), random(width) + 1

    def to(self, dtype):
        other = object.__new__(Case)
        other.__dict__ = {name: tensor.to(dtype) for name, tensor in self.__dict__.items()}
        return other


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("has", ["", "norm", "bias", "residual", "norm bias residual"])
@pytest.mark.parametrize(("num_out", "width"), SIZES)
def test_error_of_a_product_is_at_most_that_of_plain_torch(device, dtype, num_out, width, has):
    case = Case(num_out, width, dtype, device)

    def product(function, c):
        more = {name: getattr(c, name) for name in has.split()}
        return function(c.x, c.weight, eps=EPS, **more)

    found = product(linear_of_row, case)
    exact, plain = product(linear_of_row_reference, case.to(torch.float64)), product(linear_of_row_reference, case)
    assert found.dtype == dtype and found.shape == (1, num_out)
    assert error(found, exact) <= 1.5 * error(plain, exact) + torch.finfo(dtype).eps


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("num_out", "width"), SIZES)
def test_error_of_swiglu_is_at_most_that_of_plain_torch(device, dtype, num_out, width, has_norm):
    case = Case(num_out, width, dtype, device)
    case.weight, case.up = case.weight * width**-0.5, case.up * width**-0.5

    def product(function, c):
        return function(c.x, c.weight, c.up, c.norm if has_norm else None, EPS)

    found = product(swiglu_of_row, case)
    exact, plain = product(swiglu_of_row_reference, case.to(torch.float64)), product(swiglu_of_row_reference, case)
    assert found.dtype == dtype and found.shape == (1, num_out)
    assert error(found, exact) <= 1.5 * error(plain, exact) + torch.finfo(dtype).eps


def test_the_references_are_the_definition():
    c = Case(37, 513, torch.float64)
    normed = rms_norm(c.x, c.norm.shape, c.norm, EPS)
    found = linear_of_row_reference(c.x, c.weight, c.bias, c.norm, EPS, c.residual)
    torch.testing.assert_close(found, normed @ c.weight.T + c.bias + c.residual)
    found = swiglu_of_row_reference(c.x, c.weight, c.up, c.norm, EPS)
    torch.testing.assert_close(found, silu(linear(normed, c.weight)) * linear(normed, c.up))


def test_weights_may_be_rows_of_a_joined_matrix(device):
    case = Case(96, 520, device=device)
    own, wide = linear_of_row(case.x, case.weight), torch.full((100, 640), float("nan"), device=device)
    wide[2:98, :520] = case.weight
    found = linear_of_row(case.x, wide[2:98, :520])
    torch.testing.assert_close(found, own)  # on a GPU read in other widths, so added in another order


def test_nothing_that_goes_in_is_changed(device):
    case = Case(37, 513, device=device)
    before = {name: tensor.clone() for name, tensor in case.__dict__.items()}
    linear_of_row(case.x, case.weight, case.bias, case.norm, EPS, case.residual)
    swiglu_of_row(case.x, case.weight, case.up, case.norm, EPS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.__dict__.items())
