"""Percentiles and output shared by the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def percentiles(name: str, values_ms: Sequence[float]) -> dict[str, float]:
    """{name_p50, name_p90, name_p99} in milliseconds."""
    return {f"{name}_p{p}": round(float(np.percentile(values_ms, p)), 3) for p in (50, 90, 99)}


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Writes the result file, and the result as the last line of standard output."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
