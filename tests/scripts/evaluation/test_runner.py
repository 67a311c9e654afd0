"""Questions answered by one worker or by several, all at once or in parts, give the same records."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusionrag.config import EngineConfig, ModelConfig, PreprocessConfig, PromptConfig, ReuseConfig
from fusionrag.errors import PromptTooLong
from scripts.evaluation.datasets import Example, Passage
from scripts.evaluation.methods import FULL, Base
from scripts.evaluation.records import Configuration, Record
from scripts.evaluation.runner import Setup, Task, devices, run
from tests.scripts.conftest import PASSAGES

GRID = (FULL, Configuration("reuse", 0.0, 0), Configuration("default", 0.15, 0))
EXAMPLES = [
    Example(title, f"Who is {title}?", (title,), tuple(Passage(*p) for p in PASSAGES[:3])) for title, _ in PASSAGES[:4]
]


@pytest.fixture
def setup(tiny_model) -> Setup:
    base = Base(ReuseConfig(), PreprocessConfig())
    return Setup(ModelConfig(model=str(tiny_model)), PromptConfig(), EngineConfig(), base, num_threads=1)


def by_key(results) -> dict[tuple[str, Configuration], Record]:
    return {record.key: replace(record, ttft_ms=0.0) for records in results for record in records}


def test_several_workers_give_what_one_gives(setup):
    tasks = [Task(e, {}, GRID) for e in EXAMPLES]
    one = by_key(run(setup, tasks))
    assert len(one) == 12 and by_key(run(setup, tasks, num_workers=2)) == one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_gpu_gives_what_the_cpu_gives(setup, num_workers):
    tasks = [Task(e, {}, GRID) for e in EXAMPLES]
    cpu, gpu = (
        by_key(run(replace(setup, model=replace(setup.model, device=device, dtype="float32")), tasks, num_workers))
        for device in ("cpu", "cuda")
    )
    assert gpu.keys() == cpu.keys()
    for key, record in cpu.items():
        assert gpu[key].prediction == record.prediction
        assert gpu[key].kl_to_full == pytest.approx(record.kl_to_full, abs=1e-4)


def test_part_of_the_grid_gives_what_the_whole_gives(setup):
    """So that a resumed run computes only what is lacking, and full prefill to measure it against."""
    whole = by_key(run(setup, [Task(EXAMPLES[0], {}, GRID)]))
    part = by_key(run(setup, [Task(EXAMPLES[0], {}, (FULL, GRID[2]))]))
    assert len(part) == 2 and part.items() <= whole.items()


def test_a_question_that_fails_does_not_cost_the_others(setup):
    too_long = replace(EXAMPLES[0], passages=(Passage("", "long " * 2000),))
    results = run(setup, [Task(e, {}, (FULL,)) for e in (too_long, *EXAMPLES[1:])], num_workers=2)
    answered = []
    with pytest.raises(PromptTooLong):
        for records in results:
            answered += [record.example_id for record in records]
    assert sorted(answered) == sorted(e.example_id for e in EXAMPLES[1:])


def test_workers_take_turns_on_all_gpus_unless_one_is_named():
    for every in ("auto", "cuda"):
        assert devices(every, 5, num_gpus=2) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
        assert devices(every, 2, num_gpus=0) == [every, every]
    assert devices("cuda:1", 2, num_gpus=4) == ["cuda:1", "cuda:1"]
    assert devices("cpu", 2, num_gpus=4) == ["cpu", "cpu"]
