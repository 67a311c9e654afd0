"""A residual branch added to the stream, and the RMS norm of the sum, in one pass. Knows nothing of layers."""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm

from fusionrag.kernels.backend import jit, padded, takes, tl

MAX_WIDTH = 16384  # a row is held in registers


def add_norm(
    hidden: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden, branch: (R, N), contiguous. weight: (N,). Returns `hidden + branch`, rounded, and the norm of that."""
    num_rows, width = hidden.shape
    if width > MAX_WIDTH or not takes("add_norm", hidden.device, hidden.dtype, branch.dtype, weight.dtype):
        return add_norm_reference(hidden, branch, weight, eps)
    assert hidden.is_contiguous() and branch.is_contiguous() and hidden.shape == branch.shape
    total, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    if num_rows:
        block = padded(width)
        _add_norm_kernel[(num_rows,)](
            hidden, branch, weight, total, normed, eps, WIDTH=width, BLOCK=block, num_warps=4 if block <= 2048 else 8
        )
    return total, normed


@jit("eps")
def _add_norm_kernel(hidden, branch, weight, total, normed, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row."""
    at = tl.arange(0, BLOCK)
    inside, row = at < WIDTH, tl.program_id(0).to(tl.int64) * WIDTH
    kind = total.dtype.element_ty
    added = tl.load(hidden + row + at, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(branch + row + at, mask=inside, other=0.0).to(tl.float32)
    rounded = added.to(kind)
    tl.store(total + row + at, rounded, mask=inside)
    added = rounded.to(tl.float32)  # the stream as later layers read it
    factor = 1.0 / tl.sqrt_rn(tl.sum(added * added, 0) / WIDTH + eps)  # rsqrt is off by more than fp32's rounding
    scaled = added * factor * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + at, scaled.to(kind), mask=inside)


def add_norm_reference(
    hidden: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch: same arguments, same result."""
    total = hidden + branch
    return total, rms_norm(total, weight.shape, weight, eps)
