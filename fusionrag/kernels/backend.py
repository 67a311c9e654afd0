"""Whether a kernel can run: is Triton here, is the tensor on a GPU it compiles for. Knows nothing of what kernels do.

Every kernel is one file: public function, launch, Triton body, plain-torch reference of the same signature. The public
function asks `takes` and runs the reference where a kernel cannot; on a GPU that is said once per process and reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton on a machine without a GPU
    triton = tl = None

__all__ = [
    "INTERPRETED",
    "LOG2_E",
    "capability",
    "has_wgmma",
    "jit",
    "jit_with",
    "padded",
    "takes",
    "tl",
    "to_device",
    "triton",
    "why_not",
]

log = logging.getLogger(__name__)
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # for tests: kernels run on the CPU
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)
LOG2_E = 1.4426950408889634  # GPUs have 2^x, not e^x: scores are scaled by it


def jit(*vague: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`. Without Triton the body itself, which nobody calls.

    vague: arguments, by name, for whose value or alignment no code of its own is made: they change from pass to pass.
    """
    return jit_with(triton, *vague)


def jit_with(compiler: Any, *vague: str) -> Callable[[Callable[..., Any]], Any]:
    """The same of another compiler of Triton's; None where it is not there."""
    return lambda body: body if compiler is None else compiler.jit(body, do_not_specialize=vague)


def takes(name: str, device: torch.device, *dtypes: torch.dtype, head_dim: int = 1) -> bool:
    """Whether kernel `name` runs for these; if it does not on a GPU, one warning tells why the reference runs."""
    reason = why_not(device, *dtypes, head_dim=head_dim)
    if reason and device.type == "cuda":
        _warn(name, reason)
    return not reason


def why_not(device: torch.device, *dtypes: torch.dtype, head_dim: int = 1) -> str:
    """Why no kernel runs for these, in words; empty where kernels do."""
    if INTERPRETED:
        is_wrong = torch.bfloat16 in dtypes
        return (
            "Triton's interpreter is wrong for bfloat16" if is_wrong else "" if device.type == "cpu" else "interpreted"
        )
    if device.type != "cuda":
        return f"the model is on the {device.type.upper()}"
    if triton is None:
        return "Triton is not installed"
    if capability(device) < MIN_CAPABILITY:
        return f"the GPU's compute capability is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    strange = [str(d) for d in dtypes if d not in DTYPES]
    if strange:
        return f"dtype {strange[0]}"
    return f"head_dim {head_dim} is above {MAX_HEAD_DIM}" if head_dim > MAX_HEAD_DIM else ""


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _warn(name: str, reason: str) -> None:
    log.warning("kernel %s does not run, plain torch does, slower: %s", name, reason)


def has_wgmma(device: torch.device) -> bool:
    """Whether the matrix instructions of Hopper are there."""
    return device.type == "cuda" and capability(device)[0] == 9


def padded(n: int, at_least: int = 16) -> int:
    """The power of two that holds n: Triton's blocks have such sides."""
    return max(at_least, 1 << (n - 1).bit_length())


def to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small host tensor on its way to `device`; nobody waits.

    Not while stored KV is crossing the link on another stream: what serves copies goes on with one stream as long as
    that has more.
    """
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
