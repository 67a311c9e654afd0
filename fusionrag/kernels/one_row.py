"""Linear layers of a single row, as decoding one request has them: nothing but reading the weights once.

What stands around a product costs more time to launch than to compute, so it is part of it: the norm in front of it,
the bias and the residual behind it, and silu(gate) · up. Knows nothing of attention, requests or layers.

More rows than one are the matrix library's: it reads the weights once for all of them.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, rms_norm

from fusionrag.kernels.backend import jit, takes, tl, triton
from fusionrag.kernels.swiglu import silu_mul_reference

BLOCK_N, BLOCK_K, NUM_WARPS = 2, 512, 2  # outputs of a program; numbers of the row at once; a thread has 8 of them


def linear_of_row(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + bias + weight · normed(x); (1, N) of x's dtype, which all have.

    x: (1, K). weight: (N, K), its rows contiguous. bias: (N,). norm: (K,), of the RMS norm with `eps`; None: x as it
    is. residual: (1, N). Contiguous.
    """
    if not takes("linear_of_row", x.device, x.dtype, weight.dtype):
        return linear_of_row_reference(x, weight, bias, norm, eps, residual)
    return _launch(x, weight, None, bias, norm, eps, residual)


def swiglu_of_row(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, norm: torch.Tensor | None = None, eps: float = 0.0
) -> torch.Tensor:
    """silu(gate · normed(x)) · (up · normed(x)); (1, N). gate, up: (N, K); the rest as in `linear_of_row`."""
    if not takes("swiglu_of_row", x.device, x.dtype, gate.dtype, up.dtype):
        return swiglu_of_row_reference(x, gate, up, norm, eps)
    assert gate.stride() == up.stride()
    return _launch(x, gate, up, None, norm, eps, None)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    assert len(x) == 1 and x.is_contiguous() and weight.stride(1) == 1
    num_out, width = weight.shape
    out = x.new_empty(1, num_out)
    _one_row_kernel[(triton.cdiv(num_out, BLOCK_N),)](
        x, weight, up, bias, norm, residual, out, weight.stride(0), num_out, eps,
        WIDTH=width, HAS_UP=up is not None, HAS_BIAS=bias is not None, HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


@jit("num_out", "eps")
def _one_row_kernel(
    x, weight, up, bias, norm, residual, out, stride_weight, num_out, eps,
    WIDTH: tl.constexpr, HAS_UP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs. The norm's factor is the same for all of them and comes last.

    Weights are asked for one block ahead of their use. What lies behind the last output is read as the last one's.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_k = tl.arange(0, BLOCK_K)
    at = tl.minimum(outputs, num_out - 1).to(tl.int64)[:, None] * stride_weight + at_k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_acc, squares = acc, tl.zeros([BLOCK_K], tl.float32)
    inside = at_k < WIDTH
    tile = tl.load(weight + at, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
    if HAS_UP:
        up_tile = tl.load(up + at, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
    for start in range(0, WIDTH, BLOCK_K):
        inside = start + at_k < WIDTH
        row = tl.load(x + start + at_k, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += row * row
            row *= tl.load(norm + start + at_k, mask=inside, other=0.0).to(tl.float32)
        acc += tile.to(tl.float32) * row[None, :]
        inside = start + BLOCK_K + at_k < WIDTH
        tile = tl.load(weight + at + (start + BLOCK_K), mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        if HAS_UP:
            up_acc += up_tile.to(tl.float32) * row[None, :]
            up_tile = tl.load(
                up + at + (start + BLOCK_K), mask=inside[None, :], other=0.0, eviction_policy="evict_first"
            )
    found = tl.sum(acc, 1)
    factor = 1.0
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
        found *= factor
    if HAS_UP:
        found = found / (1.0 + tl.exp(-found)) * (tl.sum(up_acc, 1) * factor)
    is_output = outputs < num_out
    if HAS_BIAS:
        found += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        found += tl.load(residual + outputs, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out + outputs, found.to(out.dtype.element_ty), mask=is_output)


def linear_of_row_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain torch: same arguments; rounds in between, where the kernel rounds once."""
    out = linear(_normed(x, norm, eps), weight, bias)
    return out if residual is None else residual + out


def swiglu_of_row_reference(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, norm: torch.Tensor | None = None, eps: float = 0.0
) -> torch.Tensor:
    """Plain torch: same arguments; rounds in between, where the kernel rounds once."""
    normed = _normed(x, norm, eps)
    return silu_mul_reference(linear(normed, gate), linear(normed, up))


def _normed(x: torch.Tensor, norm: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if norm is None else rms_norm(x, norm.shape, norm, eps)
