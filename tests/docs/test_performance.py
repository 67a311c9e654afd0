"""docs/performance.md: the floor's table is what the command beside it prints, and every command can be parsed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from fusionrag.config import EngineConfig
from fusionrag.errors import ConfigError
from fusionrag.memory import check_memory, footprint
from scripts.bench.random_model import SHAPES
from scripts.cli import _parse, main

PAGE = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("fusionrag ")
]


def test_the_table_of_the_floor_is_what_its_command_prints(capsys):
    (command,) = [c for c in COMMANDS if c[:2] == ["bench", "floor"]]
    assert main(command) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == 12 and "\n".join(printed) in PAGE


def test_the_ceilings_of_the_floor_are_those_of_the_machine_that_is_named():
    (command,) = [c for c in COMMANDS if c[:2] == ["bench", "floor"]]
    stated = [float(command[command.index(flag) + 1]) for flag in ("--matrix-tflops", "--memory-gb", "--link-gb")]
    machine = PAGE.partition("## The machine")[2].partition("## The floor")[0]
    told = [float(n.replace(",", "")) for n in re.findall(r"\| ([\d.,]+) T?(?:FLOP|GB)/s \|", machine)]
    assert stated == told


def test_the_refusal_that_is_quoted_is_the_one_that_is_given():
    hf_config = AutoConfig.for_model("qwen2", **{k: v for k, v in SHAPES["qwen2.5-7b"].items() if k != "model_type"})
    with pytest.raises(ConfigError) as refused:
        check_memory(footprint(hf_config, torch.bfloat16, "none"), EngineConfig(arena_tokens=1_500_000), 0, 79 << 30)
    assert str(refused.value) in re.sub(r"\s+", " ", PAGE)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_can_be_parsed(command):
    assert _parse(command).command == "bench"
