"""Where the kernels' tests run: plain torch on the CPU, kernels on a GPU, kernels in Triton's interpreter on the CPU.

The interpreter is chosen for a whole process (TRITON_INTERPRET=1); `test_interpreter.py` starts one.
"""

from __future__ import annotations

import pytest
import torch

from fusionrag.kernels.backend import INTERPRETED

HAS_CUDA = torch.cuda.is_available() and not INTERPRETED
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")])
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


@pytest.fixture(params=["cpu", CUDA])
def kernel_device(request):
    """Where a kernel runs, not its reference."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("the kernel itself runs on a GPU or in Triton's interpreter (TRITON_INTERPRET=1)")
    return request.param


@pytest.fixture(params=[CUDA])
def gpu(request):
    """Where neither reference nor interpreter will do."""
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]
