"""Imports point one way: index ← fusionrag ← server ← scripts. Read from the import statements of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HTTP = ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client")
TENSORS = ("torch", "safetensors", "transformers")


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package.replace(".", "/")).rglob("*.py"))
    assert found, package
    return found


def imported(source: str, package: tuple[str, ...]) -> set[str]:
    """Dotted names of all modules and names that a module of `package` imports, wherever the statement stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def is_part_of(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offences(package: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in sorted(imported(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parent.parts))
        if any(is_part_of(name, f) for f in forbidden)
    ]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("index", ("fusionrag", "server", "scripts", *HTTP, *TENSORS[:2])),
        ("fusionrag", ("server", "scripts", *HTTP)),
        ("server", ("scripts", *TENSORS)),
        ("fusionrag.preprocess", ("fusionrag.reprocess",)),
        ("fusionrag.reprocess", ("fusionrag.preprocess",)),
        ("fusionrag.kernels", ("fusionrag.engine", "fusionrag.layout", "fusionrag.store", "index")),
        ("fusionrag.store", ("fusionrag.engine", "fusionrag.model", "fusionrag.layout", "transformers")),
    ],
)
def test_a_package_imports_nothing_that_stands_above_it(package, forbidden):
    assert offences(package, forbidden) == []


def test_import_statements_are_found_wherever_they_stand():
    source = """
import a.b
from c import d as e
from .. import l

if TYPE_CHECKING:
    from .h.i import j, k

def f():
    import g
"""
    assert imported(source, ("x", "y")) == {"a.b", "c.d", "g", "x.y.h.i.j", "x.y.h.i.k", "x.l"}


NOT_INSTALLED = ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "faiss", "sentence_transformers")
WITHOUT = f"""
import sys

class Without:
    '''A finder that does not find what is not installed.'''
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition('.')[0] in {NOT_INSTALLED} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run_without(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` where HTTP server, vector index and embedder are not installed."""
    return subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_engine_and_evaluation_import_without_server_and_index_libraries():
    done = run_without(
        "import fusionrag.engine, fusionrag.rag, fusionrag.preprocess.job, scripts.evaluation.runner\n"
        f"print(sorted(set(sys.modules) & set({NOT_INSTALLED})))"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_check_above_can_fail():
    for module in NOT_INSTALLED:
        done = run_without(f"import {module}")
        assert done.returncode == 1 and f"No module named '{module}'" in done.stderr
