"""silu_mul against fp64."""

from __future__ import annotations

import pytest
import torch

from fusionrag.kernels.swiglu import silu_mul, silu_mul_reference


@pytest.mark.parametrize("shape", [(1,), (0, 7), (3, 17), (2, 5, 2049), (40, 4096)], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(device, dtype, shape):
    draw = torch.Generator().manual_seed(0)
    gate, up = ((3 * torch.randn(shape, generator=draw)).to(device, dtype) for _ in range(2))
    exact = gate.double() * gate.double().sigmoid() * up.double()
    ours, plain = silu_mul(gate, up), silu_mul_reference(gate, up)
    assert ours.dtype == dtype and ours.is_contiguous()
    worst, allowed = ((x.double() - exact).norm() for x in (ours, plain))
    assert worst <= 2 * allowed


def test_halves_of_one_projection_are_taken_as_they_are(device):
    fused = torch.randn(30, 200, device=device)
    gate, up = fused.chunk(2, dim=-1)
    torch.testing.assert_close(silu_mul(gate, up), silu_mul_reference(gate, up))


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's, in the interpreter: e^200 is infinite and 1/∞ is meant
@pytest.mark.parametrize("gate", [-200.0, -90.0, 0.0, 90.0, 200.0])
def test_far_ends_stay_finite(device, gate):
    out = silu_mul(torch.tensor([gate], device=device), torch.tensor([2.0], device=device))
    assert out.item() == pytest.approx(2 * max(gate, 0.0), abs=1e-30)
