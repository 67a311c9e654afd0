"""Sizes of passes: never too small, never much too large, and the fastest of those that were timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fusionrag.model import LanguageModel
from fusionrag.row_sizes import SLACK, STEP, RowSizes

LARGEST = 2048


@pytest.mark.parametrize("num_rows", [1, 16, 17, 120, 1203, 2047, LARGEST])
def test_on_a_cpu_rows_are_rounded_up_to_the_next_step(num_rows, make_model):
    assert RowSizes(make_model(), LARGEST).at_least(num_rows) == -(-num_rows // STEP) * STEP


@pytest.fixture
def sizes():
    """As if on a GPU on which every other multiple of 32 is slow."""
    found = RowSizes(SimpleNamespace(device=torch.device("cuda")), LARGEST)
    found.__dict__["_elapsed_ms"] = {n: n * (1.2 if n % 64 == 32 else 1.0) for n in range(128, LARGEST + 1, STEP)}
    return found


def test_the_fastest_size_near_by_is_taken(sizes):
    assert [sizes.at_least(n) for n in (1200, 1201, 1217, 1232)] == [1200, 1216, 1232, 1232]
    assert [sizes.at_least(n) for n in (1233, 1248, 1249)] == [1264, 1264, 1264]  # 1248 is slow


@pytest.mark.parametrize("num_rows", [1, 100, 127, 128, 129, 1000, 1999, 2033, LARGEST])
def test_rows_fit_and_not_many_are_added(num_rows, sizes):
    assert num_rows <= sizes.at_least(num_rows) <= min(num_rows + SLACK + STEP, LARGEST)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_size_is_timed(make_hf, make_config, tokenizer):
    model = LanguageModel(make_hf(make_config("llama"), "eager").to("cuda"), tokenizer, "tiny")
    sizes = RowSizes(model, 256)
    assert 200 <= sizes.at_least(200) <= 256
    assert all(sizes._elapsed_ms[n] > 0 for n in range(128, 257, STEP))
