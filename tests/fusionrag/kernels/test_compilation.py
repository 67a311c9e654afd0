"""Every kernel compiles for both GPU generations, on a machine that has neither, and keeps to its registers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fusionrag.kernels.backend import INTERPRETED, triton


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills(capability):
    """In a process of its own, in which launches compile instead."""
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
