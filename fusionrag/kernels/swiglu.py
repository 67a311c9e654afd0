"""silu(gate) · up in one pass over the bytes. Knows nothing of what is projected before or after."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from fusionrag.kernels.backend import jit, takes, tl, triton

BLOCK = 2048  # numbers of one program


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up: (..., N), same shape and dtype, last dimension contiguous. Returns a new, contiguous tensor."""
    if not takes("silu_mul", gate.device, gate.dtype):
        return silu_mul_reference(gate, up)
    out = gate.new_empty(gate.shape)
    if out.numel():
        is_flat = gate.is_contiguous() and up.is_contiguous()
        width = gate.numel() if is_flat else gate.shape[-1]
        gate_rows, up_rows = gate.reshape(-1, width), up.reshape(-1, width)
        blocks = triton.cdiv(width, BLOCK)  # of a row; neighbours run at the same time: memory is read in order
        _silu_mul_kernel[(len(gate_rows) * blocks,)](
            gate_rows, up_rows, out, gate_rows.stride(0), up_rows.stride(0), width, blocks, BLOCK=BLOCK, num_warps=4
        )
    return out


@jit("blocks")
def _silu_mul_kernel(gate, up, out, stride_gate, stride_up, width, blocks, BLOCK: tl.constexpr):
    """One program: BLOCK numbers of one row, which has `blocks` of them."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(gate + row * stride_gate + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + row * stride_up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (x / (1.0 + tl.exp(-x)) * y).to(out.dtype.element_ty), mask=inside)


def silu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Plain torch: same arguments; rounds once more than the kernel, between silu and the product."""
    return silu(gate).mul_(up)
