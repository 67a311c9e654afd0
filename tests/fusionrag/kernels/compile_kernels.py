"""Compiles every kernel as its public function launches it, for a GPU that need not be here.

    python compile_kernels.py 90        compute capability 9.0

Prints registers, shared memory and spills of each, and fails where a kernel spills more than MAX_SPILLS.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[3]))

from fusionrag.kernels import (
    add_norm,
    backend,
    importance,
    load,
    one_row,
    prepare_rows,
    residual,
    row_plan,
    rows_attention,
    rows_attention_hopper,
    shift,
    swiglu,
)
from fusionrag.kernels.row_plan import RequestRows, plan_rows

MAX_SPILLS = 96  # bytes a thread, stored
MAX_SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes a block may have
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


class Target:
    """Stands where Triton looks for the GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_launching(capability: int) -> list[tuple[str, Any]]:
    """From here on launches compile and add (kernel name, what was compiled) to the list that is returned."""
    compiled: list[tuple[str, Any]] = []
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append((self.fn.__name__, launch(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = run
    triton.runtime.driver.set_active(Target(capability))
    for module in (
        add_norm, importance, load, one_row, prepare_rows, residual, row_plan, rows_attention, shift, swiglu
    ):  # fmt: skip
        module.takes = lambda *_, **__: True
    row_plan.has_wgmma = lambda _: capability == 90
    rows_attention_hopper.takes = lambda _, dtype, head_dim, window: (
        capability == 90 and dtype.itemsize == 2 and head_dim in rows_attention_hopper.STAGES and window is None
    )
    return compiled


def attend(num_rows: int, head_dim: int, dtype: torch.dtype, window: int | None = None, num_requests: int = 1) -> None:
    num_heads, num_kv_heads, num_keys = 14, 2, 2048
    requests = [RequestRows(i * num_rows, num_rows, i * num_keys, num_keys) for i in range(num_requests)]
    positions = torch.arange(num_rows * num_requests)
    queries = torch.empty(len(positions), num_heads, head_dim, dtype=dtype)
    keys = torch.empty(num_kv_heads, num_keys * num_requests, head_dim, dtype=dtype)
    plan = plan_rows(positions, positions, requests, num_heads, num_kv_heads, head_dim, dtype, window)
    lse = torch.empty(queries.shape[:2])
    rows_attention.rows_attention(queries, keys, keys, plan, 0.1)
    rows_attention.rows_attention(queries, keys, keys, plan, 0.1, lse=lse)
    importance.attention_mass(queries, keys, plan, (0, num_rows), num_keys, 0.1, lse)


def prepare(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    queries, keys = torch.empty(40, 14, head_dim, dtype=dtype), torch.empty(40, 2, head_dim, dtype=dtype)
    cos, arena = torch.empty(40, rotary_dim // 2), torch.empty(2, 2048, head_dim, dtype=dtype)
    prepare_rows.prepare_rows_(queries, keys, keys, cos, cos, torch.arange(40), arena, arena)


def correct(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    """Mean residuals of chunks, and their sum into the arena."""
    fresh, arena = torch.empty(2, 40, head_dim, dtype=dtype), torch.empty(2, 2048, head_dim, dtype=dtype)
    cos, bounds = torch.empty(40, rotary_dim // 2), torch.zeros(4, dtype=torch.int64)
    shifts = residual.mean_residual(fresh, fresh, arena, arena, torch.arange(40), bounds, cos, cos, 1.0)
    first_slot, chunk_of = torch.zeros(1, dtype=torch.int64), torch.zeros(40, dtype=torch.int64)
    shift.shift_(arena, arena, first_slot, chunk_of, *shifts, cos, cos)


def load_all(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    arena, table = torch.empty(4, 2, 2048, head_dim, dtype=dtype), torch.zeros(2, 6, dtype=torch.int64)
    for codec in ("none", "float16", "int8", "int4"):
        source, inv_freq = torch.empty(64, dtype=torch.uint8), torch.empty(rotary_dim // 2)
        load.load_(source, table, 512, codec, dtype, inv_freq, 1.0, arena, arena)


def multiply_row(width: int, num_out: int, dtype: torch.dtype) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    x, out, norm, weight = empty(1, width), empty(1, num_out), empty(width), empty(num_out, width)
    one_row.linear_of_row(x, weight, out[0], norm, 1e-6)
    one_row.linear_of_row(x, weight, residual=out)
    one_row.swiglu_of_row(x, weight, weight, norm, 1e-6)


def compile_all() -> None:
    """The variants that differ: dtypes, head dims, few rows and many, with a window, split over keys."""
    for head_dim in (64, 80, 128, 256):
        for num_rows in (1, 5, 300):
            attend(num_rows, head_dim, torch.bfloat16)
    attend(300, 128, torch.float16)
    attend(300, 128, torch.bfloat16, window=512)
    attend(1, 128, torch.bfloat16, num_requests=16)
    attend(300, 64, torch.float32)
    for head_dim, rotary_dim in ((128, 128), (80, 32)):
        prepare(head_dim, rotary_dim, torch.bfloat16)
        correct(head_dim, rotary_dim, torch.bfloat16)
        load_all(head_dim, rotary_dim, torch.bfloat16)
    width = torch.empty(4, 3584, dtype=torch.bfloat16)
    add_norm.add_norm(width, width, width[0], 1e-6)
    multiply_row(3584, 4608, torch.bfloat16)
    swiglu.silu_mul(torch.empty(4, 8192, dtype=torch.bfloat16), torch.empty(4, 8192, dtype=torch.bfloat16))


def all_kernels(capability: int) -> set[str]:
    """The names of everything in `fusionrag.kernels` that is launched on this GPU."""
    folder = Path(backend.__file__).parent
    files = [f for f in folder.glob("*.py") if capability == 90 or not f.stem.endswith("_hopper")]
    return {name for f in files for name in re.findall(r"^def (\w+_kernel)\(", f.read_text(), re.MULTILINE)}


def resources(ptx: str) -> tuple[int, int]:
    """Registers a thread and bytes of spill stores, as ptxas says."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source, tempfile.NamedTemporaryFile() as target:
        source.write(ptx)
        source.flush()
        architecture = re.search(r"\.target (sm_\w+)", ptx)
        assert architecture
        command = [PTXAS, "-v", f"--gpu-name={architecture[1]}", source.name, "-o", target.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spills, said
    return int(registers[1]), int(spills[1])


def main() -> int:
    assert not backend.INTERPRETED, "TRITON_INTERPRET is set: nothing would be compiled"
    capability, status, seen = int(sys.argv[1]), 0, set()
    compiled = compile_instead_of_launching(capability)
    compile_all()
    if missing := all_kernels(capability) - {name for name, _ in compiled}:
        sys.stdout.write(f"FAIL {', '.join(sorted(missing))}: not compiled by this script\n")
        status = 1
    for name, kernel in compiled:
        if kernel.hash in seen:
            continue
        seen.add(kernel.hash)
        registers, spills = resources(kernel.asm["ptx"])
        shared, options = kernel.metadata.shared, kernel.metadata
        is_good = spills <= MAX_SPILLS and shared <= MAX_SHARED[capability]
        status |= not is_good
        said = f"{registers} registers, {spills} bytes spilled, {shared} bytes shared"
        how = f"{options.num_warps} warps, {options.num_stages} stages"
        sys.stdout.write(f"{'ok  ' if is_good else 'FAIL'} {name}: {said}, {how}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
