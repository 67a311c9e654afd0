"""Every command of every guide, run as a reader runs it: top to bottom, in an empty directory, with the real model.

A ```bash block is run, a ```python block too, as a script of its own; both within one bash session a guide, which stops
at the first command that fails. A word behind `bash` says why a block is not run (`NOT_RUN`). ```text and ```toml are
never run. Guides say port 8000; here each has a free one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusionrag.default_model import default_model_dir
from fusionrag.errors import ModelNotFound

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "guides"
INDEX = FOLDER / "README.md"
GUIDES = sorted(page.stem for page in FOLDER.glob("*.md") if page != INDEX)
NOT_RUN = {
    "install": "changes what is installed, and may need a network",
    "docker": "needs a container engine",
    "gpu": "needs a GPU",
    "hub": "needs a network",
    "long": "takes minutes",
}
LANGUAGES = {"bash", "python", "text", "toml", "json", ""}
PRINTED = {  # what a reader must get to see; everything else is the guide's own checks
    "quick-start": ("3 documents added", "Ada Morrow", "handbook/people.md", "Time to first token", '"sources"'),
    "own-model": ("fused KV is there", "computed for another instruction", "max_model_len"),
    "own-documents": (
        "4 documents added",
        "1 changed",
        "1 documents with 1 chunks deleted",
        "completed None",
        "quill-4.2.txt",
        "vector_store.deleted",
        "footnotes",
    ),
    "api": (
        '"content":"Ada Morrow"',
        '"filename":"people.md"',
        "server-timing: ",
        "event: response.completed",
        "collection_not_found",
        "unknown_parameter",
        "2 vectors of 384",
    ),
    "operations": (
        '"status":"ready"',
        '"status":"ok"',
        "invalid_api_key",
        "metrics are for the operator",
        "fusionrag_time_to_first_token_seconds",
        "fusionrag_chunks",
        '"route": "/v1/models", "status": 200',
        "alice\tadded",
    ),
    "tuning-the-ratio": ("recall@3", "norm.F1", "reuse ", "difference to full (ratio 1, 0 related)"),
    "benchmark": ("ttft_ms_p50", "speedup_vs_full", "request_throughput"),
}
REFUSED = {"api": [404, 400], "operations": [401]}  # statuses that a guide means to get; curl takes any for success
LIMIT_S = 400  # of one guide, on a machine with much else to do
NUM_AT_ONCE = 2

_FENCE = re.compile(r"^```(\w*)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. `label`: the word behind its language, '' for none; `line`: where it begins, from 1."""

    language: str
    label: str
    text: str
    line: int

    @property
    def is_run(self) -> bool:
        return self.language in ("bash", "python") and not self.label


@dataclass(frozen=True)
class Run:
    """What came of a guide; `folder` is where it ran."""

    status: int
    output: str
    folder: Path


def page(guide: str) -> Path:
    return FOLDER / f"{guide}.md"


def blocks_of(text: str) -> list[Block]:
    return [
        Block(match[1], match[2] or "", match[3], text[: match.start()].count("\n") + 1)
        for match in _FENCE.finditer(text)
    ]


def session(blocks: list[Block], python: str) -> str:
    """One bash script. Servers that a guide leaves running end with it."""
    parts = [
        "set -Eeuo pipefail",
        "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT",
        """trap 'echo "FAILED at line $AT: $BASH_COMMAND" >&2' ERR""",
    ]
    for block in blocks:
        parts.append(f"AT={block.line}")
        if block.language == "python":
            parts.append(f"{shlex.quote(python)} - <<'END_OF_PYTHON'\n{block.text}END_OF_PYTHON")
        else:
            parts.append(block.text)
    return "\n".join(parts)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_guide(guide: str, folder: Path, environment: Mapping[str, str]) -> Run:
    port = free_port()
    script = session([b for b in blocks_of(page(guide).read_text()) if b.is_run], sys.executable)
    script = script.replace(":8000", f":{port}").replace("--port 8000", f"--port {port}")
    log = folder / "output.log"
    scratch = folder / "scratch"
    scratch.mkdir()
    with log.open("wb") as output:  # not a pipe: a server in the background would keep it open
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=scratch,
            env={**environment, "FUSIONRAG_PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever has outlived it
            process.wait()
    return Run(status, log.read_text(errors="replace"), scratch)


def statuses(log: Path) -> list[int]:
    """Of all requests that a guide's servers have answered."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["status"] for line in lines if line.startswith("{")]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> Iterator[dict[str, Future[Run]]]:
    """Every guide that was asked for, under way: most of a command's time is its start, on one core."""
    try:
        default_model_dir()  # converted once, not by all of them
    except ModelNotFound as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("guides")
    (folder / "bin").mkdir()
    command = folder / "bin" / "fusionrag"  # of this tree, whatever is installed
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m scripts.cli "$@"\n')
    command.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FUSIONRAG_", "OPENAI_"))}
    environment = {
        **kept,
        "FUSIONRAG_CACHE": str(default_model_dir().parents[1]),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    tests = [item for item in request.session.items if item.module is request.module and "runs" in item.fixturenames]
    wanted = sorted({item.callspec.params["guide"] for item in tests})
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        under_way = {}
        for guide in wanted:
            (folder / guide).mkdir()
            under_way[guide] = pool.submit(run_guide, guide, folder / guide, environment)
        yield under_way


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_every_command_of_the_guide_does_what_it_says(guide, runs):
    run = runs[guide].result()
    assert run.status == 0, f"exit code {run.status}:\n{run.output[-4000:]}"
    missing = [text for text in PRINTED[guide] if text not in run.output]
    assert not missing, f"{missing} not in:\n{run.output[-4000:]}"
    assert [status for status in statuses(run.folder / "server.log") if status >= 400] == REFUSED.get(guide, [])


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["api"])
def test_the_table_of_routes_is_the_servers_own(guide, runs):
    described = json.loads((runs[guide].result().folder / "openapi.json").read_text())["paths"]
    routes = {(method.upper(), path) for path, methods in described.items() for method in methods}
    cells = re.findall(r"`((?:[A-Z]+ )+)(/[^`]*)`", page(guide).read_text())
    assert {(method, path) for methods, path in cells for method in methods.split()} == routes


def test_what_is_not_run_says_why():
    for guide in GUIDES:
        blocks = blocks_of(page(guide).read_text())
        assert page(guide).read_text().count("```") == 2 * len(blocks), f"{guide}: a fence that is no block"
        assert {b.language for b in blocks} <= LANGUAGES
        assert {b.label for b in blocks} - {""} <= set(NOT_RUN)
        assert any(b.is_run for b in blocks), f"{guide} has no command that is run"


def test_the_index_lists_every_guide_and_no_other():
    assert sorted(re.findall(r"\]\(([\w-]+)\.md\)", INDEX.read_text())) == GUIDES


@pytest.mark.parametrize("guide", [*GUIDES, "README"])
def test_every_link_leads_to_a_file_or_heading_that_exists(guide):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page(guide).read_text()):
        name, _, anchor = target.partition("#")
        file = (FOLDER / name).resolve() if name else page(guide)
        assert file.exists(), f"{guide}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_a_command_that_fails_ends_the_session_and_is_named(tmp_path):
    blocks = [Block("bash", "", "true\nfalse | cat\n", 3), Block("python", "", "print('not reached')\n", 9)]
    script = session(blocks, sys.executable)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILED at line 3" in done.stderr and "not reached" not in done.stdout
