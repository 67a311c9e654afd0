"""Documentation that repeats the code is generated or checked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.cli import COMMANDS
from scripts.docs import PAGE, render

ROOT = Path(__file__).resolve().parents[2]


def test_the_configuration_page_is_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == render(), "stale: run make docs"


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_every_file_that_a_page_names_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:index|fusionrag|server|scripts|tests|docs)/[\w/.]*)", text))
    named |= {f"{m}" for m in re.findall(r"\]\((docs/[\w./]+)\)", text)}
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_test_that_the_architecture_names_exists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    known = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"`(?:tests/fusionrag/)?(test_\w+\.py)`", text)) <= known


def test_every_command_and_flag_in_the_readme_exists():
    from scripts.cli import _parse

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ {4}fusionrag (.+?)(?: +#.*)?$", text, re.MULTILINE) + re.findall(
        r"`fusionrag ([^`…]+)`", text
    )
    assert {line.split()[0] for line in lines} <= set(COMMANDS)
    for line in lines:
        words = re.findall(r'"[^"]*"|\S+', line)
        if len(words) > 1:
            _parse([word.strip('"') for word in words])
