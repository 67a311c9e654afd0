"""add_norm against fp64."""

from __future__ import annotations

import pytest
import torch

from fusionrag.kernels.add_norm import add_norm, add_norm_reference


@pytest.mark.parametrize("shape", [(1, 16), (0, 64), (3, 96), (5, 576), (40, 3584), (2, 16384), (1, 20000)], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(device, dtype, shape):
    draw, eps = torch.Generator().manual_seed(0), 1e-5
    hidden, branch = ((2 * torch.randn(shape, generator=draw)).to(device, dtype) for _ in range(2))
    weight = torch.randn(shape[1], generator=draw).to(device, dtype)
    total, normed = add_norm(hidden, branch, weight, eps)
    plain_total, plain = add_norm_reference(hidden, branch, weight, eps)
    assert total.equal(plain_total), "the sum is rounded once, either way"
    wide = total.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    worst, allowed = ((x.double() - exact).norm() for x in (normed, plain))
    assert worst <= 2 * allowed + 1e-12
