"""The package as a whole: light to import, independent of its neighbours, documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import index

ROOT = Path(index.__file__).parent
HEAVY = ("faiss", "torch", "sentence_transformers", "transformers", "bs4", "lxml", "pypdf", "docx", "markdown_it")


def test_importing_the_package_imports_no_model_index_or_parser_library():
    code = f"import sys, index; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_imports_the_packages_above(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"fusionrag", "server", "scripts", "fastapi"}


def test_every_public_name_exists_and_is_documented():
    for name in index.__all__:
        assert getattr(index, name).__doc__, name
    assert index.__all__ == sorted(index.__all__)


def test_the_tree_of_errors_in_the_docstring_is_the_one_in_the_code():
    errors = sys.modules["index.errors"]
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), index.FusionRAGError)
        assert name in errors.__doc__
