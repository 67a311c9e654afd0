"""The examples as their readers run them: programs of their own, against one live server with the packaged model.

LlamaIndex's OpenAI classes want an older `openai` than these tests. Its example runs where an environment is that has
them: the interpreter that LLAMAINDEX_PYTHON names, or `.venv/llamaindex/bin/python`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from fusionrag.default_model import default_model_dir
from fusionrag.errors import ModelNotFound

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
QUESTION = "Where does Ada Morrow work?"
FILES = {
    "people.md": "# Ada Morrow\n\nAda Morrow is the release manager of Quill. She works in the Tarn office.\n",
    "offices.txt": "The Tarn office is in Harbour Street. It is open from eight in the morning.\n",
}
LIMIT_S = 300
KEY = "operator-key"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def base_url(folder) -> Iterator[str]:
    try:
        default_model_dir()
    except ModelNotFound as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "scripts.cli", "serve", "--port", "0", "--data-dir", str(folder / "data")]
    environment = {**os.environ, "FUSIONRAG_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    with (
        (folder / "server.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as server,
    ):
        assert server.stdout is not None
        line = server.stdout.readline()
        assert "http://" in line, (folder / "server.log").read_text()
        yield "http://" + line.strip().split("http://")[1] + "/v1"
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0


@pytest.fixture
def nothing_left(base_url) -> Iterator[None]:
    """Whatever an example makes, it takes away again."""
    yield
    with OpenAI(base_url=base_url, api_key=KEY) as client:
        assert list(client.vector_stores.list()) == []
        assert list(client.files.list()) == []


def run(folder: Path, *command: object, **environment: str) -> str:
    """What the program printed. It has to end with 0 and without a warning."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "OPENAI_API_KEY": KEY, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines_of(output: str) -> dict[str, str]:
    """The lines that begin with a label, by their label; labels and what follows are two columns."""
    return {line[:16].split("  ")[0].split(" ")[0]: line for line in output.splitlines() if not line.startswith(" ")}


def test_the_openai_client_streams_cites_and_no_longer_finds_a_deleted_file(base_url, folder, nothing_left):
    program = EXAMPLES / "openai_client.py"
    output = run(folder, sys.executable, program, "--base-url", base_url, "--question", QUESTION, *FILES)
    lines = lines_of(output)
    assert "Tarn" in lines["chat"] and "Tarn" in lines["responses"] and "Tarn" in lines["async"]
    assert "Ada Morrow (people.md)" in output and "cited: people.md\n" in output
    assert "found once people.md is deleted: offices.txt\n" in output


def test_langchain_answers_by_file_search_by_a_retriever_and_from_its_own_store(base_url, folder, nothing_left):
    pytest.importorskip("langchain_openai", reason="install the extra 'examples'")
    program = EXAMPLES / "langchain_rag.py"
    output = run(folder, sys.executable, program, "--base-url", base_url, "--question", QUESTION, *FILES)
    lines = lines_of(output)
    assert "Tarn" in lines["file_search"] and "Tarn" in lines["retriever"] and "Tarn" in lines["own"]
    assert "cited: people.md\n" in output and "found: people.md, offices.txt\n" in output


def test_llamaindex_answers_by_the_servers_search_and_from_its_own_index(base_url, folder, nothing_left):
    python = Path(os.environ.get("LLAMAINDEX_PYTHON", ROOT / ".venv" / "llamaindex" / "bin" / "python"))
    if not python.exists():
        pytest.skip("no environment with examples/llamaindex-requirements.txt; name its python in LLAMAINDEX_PYTHON")
    output = run(folder, python, EXAMPLES / "llamaindex_rag.py", "--base-url", base_url, "--question", QUESTION, *FILES)
    lines = lines_of(output)
    assert "Tarn" in lines["server's"] and "Tarn" in lines["own"]
    assert output.count("found: people.md, offices.txt\n") == 2


def test_curl_alone_uploads_asks_and_cites(base_url, folder, nothing_left):
    output = run(folder, EXAMPLES / "curl.sh", "people.md", QUESTION, BASE_URL=base_url)
    assert "answer: " in output and "Tarn" in output.splitlines()[0]
    assert "cited: people.md\n" in output
    assert output.rstrip().endswith("data: [DONE]") and '"finish_reason":"stop"' in output


def test_curl_carries_any_question_over_as_it_is(base_url, folder, nothing_left):
    """Quotes and backslashes of a question must not end its JSON string."""
    question = r'Who is the "release manager" \ of Quill?'
    output = run(folder, EXAMPLES / "curl.sh", "people.md", question, BASE_URL=base_url)
    assert "Ada Morrow" in output.splitlines()[0]
