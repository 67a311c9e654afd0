"""The kernels' own code on the CPU: the tests of this folder again, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusionrag.kernels.backend import INTERPRETED, triton

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_kernels_pass_their_tests_in_tritons_interpreter():
    """A process of its own: whether kernels are compiled or interpreted is decided when they are imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", str(HERE)]
    command += [f"--ignore={HERE / 'test_dense.py'}"]  # whole models, and no kernel of ours
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
