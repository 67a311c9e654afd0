"""The ingest process, really started: files become searchable, and killing anything loses and doubles nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fusionrag.config import ModelConfig, PromptConfig
from fusionrag.model import load_tokenizer
from fusionrag.prompt import PromptBuilder
from index import Catalogue, ChunkingConfig, DataDir, Embedder, EmbeddingConfig, Retriever
from index.attached_files import AttachedFile, Attachment
from index.config import SearchConfig
from index.ingest_queue import IngestQueue
from index.library import Library
from index.library_types import MadeWith, VectorStoreSettings
from index.types import IngestProgress
from server.ingest_messages import GivenUp, Report, Setup
from server.ingestion import Ingestion
from server.loop_lag import LoopLag

pytestmark = pytest.mark.anyio
NICE, MEMORY_BYTES = 1, 3 << 30  # hardly niced, so that a busy machine does not make the tests endless
ROOT = Path(__file__).parents[2]
MANY = 700  # records of a file whose ingest takes several batches


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory, tokenizer) -> ModelConfig:
    """A directory with a tokenizer: ingest needs no weights."""
    path = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(path)
    return ModelConfig(model=str(path))


@pytest.fixture(scope="session")
def minilm() -> Embedder:
    return Embedder(EmbeddingConfig())


@dataclass(frozen=True)
class Place:
    """A data directory with one vector store, seen from the server's side."""

    data_dir: DataDir
    library: Library
    queue: IngestQueue
    retriever: Retriever
    store: str
    setup: Setup

    def attach(self, name: str, text: str) -> str:
        begun = self.library.files.begin()
        begun.write(text.encode())
        file_id = self.library.files.keep(begun, "", name, "assistants").id
        self.library.attached.attach(self.store, "", Attachment(file_id))
        return file_id

    def state(self, file_id: str) -> AttachedFile:
        return self.library.attached.get(self.store, "", file_id)

    def texts(self) -> list[str]:
        return [c.chunk.text for c in self.queue._catalogue.chunks(self.store)]

    @asynccontextmanager
    async def ingesting(self, timeout_s: float = 120.0, **setup: object) -> AsyncIterator[Ingestion]:
        ingestion = Ingestion(self.queue, replace(self.setup, **setup), timeout_s)
        ingestion.start()
        try:
            yield ingestion
        finally:
            await ingestion.stop()


@pytest.fixture
def place(tmp_path, byte_model, minilm):
    data_dir = DataDir(tmp_path / "data")
    fingerprint = PromptBuilder(load_tokenizer(byte_model), PromptConfig()).fingerprint
    embedding = EmbeddingConfig()
    setup = Setup(str(data_dir.path), byte_model, PromptConfig(), ChunkingConfig(), embedding, NICE, MEMORY_BYTES)
    with Catalogue(data_dir.catalogue) as catalogue:
        library = Library(catalogue, data_dir)
        made_with = MadeWith(fingerprint, minilm.fingerprint, minilm.dim)
        store = library.vector_stores.create("", VectorStoreSettings(), made_with).id
        retriever = Retriever(catalogue, data_dir, minilm)
        yield Place(data_dir, library, IngestQueue(catalogue, data_dir), retriever, store, setup)


def records(number: int = MANY) -> str:
    return "".join(json.dumps({"id": i, "text": f"Entry {i} of the log."}) + "\n" for i in range(number))


async def until(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    """Looks often enough to catch a stage that is over soon."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def begun(ingestion: Ingestion, place: Place, file_id: str) -> Callable[[], bool]:
    return lambda: ingestion.progress(place.store, file_id) is not None


@pytest.mark.slow
async def test_uploads_become_searchable_in_a_niced_limited_process_that_ends_with_the_server(place):
    async with place.ingesting() as ingestion:
        assert ingestion.is_busy
        await until(lambda: not ingestion.is_busy)
        assert ingestion.pid is None, "nothing waits, so there is no process"

        moon = place.attach("moon.txt", "The moon Triton goes round Neptune backwards.")
        ingestion.wake()
        assert ingestion.is_busy
        await until(lambda: place.state(moon).status == "completed")
        hits = place.retriever.search(place.store, "Which moon goes backwards?", SearchConfig(top_k=1))
        assert [(h.chunk.document_id, h.source) for h in hits] == [(moon, "moon.txt")]
        assert os.getpriority(os.PRIO_PROCESS, ingestion.pid) == os.getpriority(os.PRIO_PROCESS, 0) + NICE
        limits = Path(f"/proc/{ingestion.pid}/limits").read_text()
        assert f"Max data size             {MEMORY_BYTES}" in limits
        assert len(list(Path(f"/proc/{ingestion.pid}/task").iterdir())) <= 8

        bad = place.attach("bad.pdf", "%PDF-1.4 but not really")
        log = place.attach("log.jsonl", records())
        ingestion.wake()
        seen: set[IngestProgress | None] = set()
        await until(lambda: seen.add(ingestion.progress(place.store, log)) or len(place.texts()) > 1)
        assert "embedding" in {p.stage for p in seen if p}
        place.library.files.delete(log, "")
        await until(lambda: not ingestion.is_busy)
        assert len(place.texts()) == 1, "what was read before the file was deleted is gone with it"
        assert (place.state(bad).status, place.state(bad).error_code) == ("failed", "invalid_file")
        assert ingestion.outcomes == {"completed": 1, "failed": 1, "withdrawn": 1}
        pid = ingestion.pid
        begin = time.monotonic()
    assert time.monotonic() - begin < 3 and not is_running(pid)
    assert ingestion.num_restarts == 0


@pytest.mark.slow
async def test_killing_the_process_loses_and_doubles_nothing_and_a_file_that_kills_it_twice_is_failed(place, caplog):
    log = place.attach("log.jsonl", records())
    async with place.ingesting() as ingestion:
        await until(lambda: place.texts() and begun(ingestion, place, log)())
        os.kill(ingestion.pid, signal.SIGKILL)
        await until(lambda: place.state(log).status == "completed")
        assert sorted(place.texts()) == sorted(f"Entry {i} of the log." for i in range(MANY))

        killer, next_one = place.attach("killer.jsonl", records()), place.attach("next.txt", "Next in line.")
        ingestion.wake()
        for _ in range(2):
            await until(begun(ingestion, place, killer))
            os.kill(ingestion.pid, signal.SIGKILL)
            await until(lambda: not begun(ingestion, place, killer)())
        await until(lambda: place.state(next_one).status == "completed")
        failed = place.state(killer)
        assert (failed.status, failed.error_code) == ("failed", "server_error")
        assert failed.error_message.startswith("killer.jsonl: ") and "ended the ingest process" in failed.error_message
        assert len(place.texts()) == MANY + 1
        assert ingestion.num_restarts == 3
    assert "has died (status -9)" in caplog.text


@pytest.mark.slow
async def test_a_file_without_progress_is_given_up_and_the_queue_goes_on(place, caplog):
    stuck, next_one = place.attach("stuck.jsonl", records()), place.attach("next.txt", "Next in line.")
    async with place.ingesting(timeout_s=10.0) as ingestion:
        await until(begun(ingestion, place, stuck))
        os.kill(ingestion.pid, signal.SIGSTOP)
        await until(lambda: place.state(next_one).status == "completed")
        assert place.state(stuck).error_code == "server_error"
        assert "no progress for 10 s" in place.state(stuck).error_message
        assert place.texts() == ["Next in line."]


SERVER = """
import asyncio, sys
from index import Catalogue, DataDir
from index.ingest_queue import IngestQueue
from server.ingest_messages import Setup
from server.ingestion import Ingestion

async def main():
    setup = Setup.decode(sys.argv[1])
    data_dir = DataDir(setup.data_dir)
    with Catalogue(data_dir.catalogue) as catalogue:
        ingestion = Ingestion(IngestQueue(catalogue, data_dir), setup, 120.0)
        ingestion.start()
        while True:
            print(ingestion.pid, flush=True)
            await asyncio.sleep(0.02)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_when_the_server_is_killed_its_process_ends_too_and_the_next_server_goes_on(place):
    log = place.attach("log.jsonl", records())
    command = [sys.executable, "-c", SERVER, place.setup.encode().decode()]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        pid = next(int(line) for line in server.stdout if line != "None\n")
        await until(place.texts)
        server.kill()
    await until(lambda: not is_running(pid), timeout_s=20)
    assert place.state(log).status == "in_progress"
    async with place.ingesting():
        await until(lambda: place.state(log).status == "completed")
    assert sorted(place.texts()) == sorted(f"Entry {i} of the log." for i in range(MANY))


@pytest.mark.slow
async def test_two_servers_on_one_data_directory_share_the_queue_one_at_a_time(place):
    async with place.ingesting() as one, place.ingesting() as other:
        files = [place.attach(f"{i}.jsonl", records(100)) for i in range(6)]
        one.wake()
        other.wake()
        both = []

        def is_done() -> bool:
            both.append(all(any(begun(i, place, f)() for f in files) for i in (one, other)))
            return all(place.state(f).status == "completed" for f in files)

        await until(is_done)
        await until(lambda: not one.is_busy and not other.is_busy)
        assert one.outcomes["completed"] + other.outcomes["completed"] == 6
    assert len(place.texts()) == 600
    assert not any(both)


@pytest.mark.slow
async def test_files_wait_and_are_not_blamed_while_the_models_cannot_be_loaded(place, caplog):
    waiting = place.attach("a.txt", "Text.")
    async with place.ingesting(embedding=EmbeddingConfig(embedding_model="/no/such/model")) as ingestion:
        await until(lambda: ingestion.num_restarts >= 1)
    assert "/no/such/model" in caplog.text
    assert place.state(waiting).status == "in_progress"


async def test_messages_arrive_as_they_were_sent():
    setup = Setup(
        "data",
        ModelConfig(model="m"),
        PromptConfig(instruction="Ä"),
        ChunkingConfig(64, 8),
        EmbeddingConfig(),
        3,
        0,
        (GivenUp(("c", "file-1"), "why"),),
    )
    assert Setup.decode(setup.encode()) == setup
    progress = IngestProgress(1, 0, 2, 3, 4, "storing")
    for report in (Report("progress", ("c", "f"), progress), Report("ended", ("c", "f"), None, "failed", "why", 3)):
        assert Report.decode(report.encode()) == report
        assert report.encode().count(b"\n") == 1


async def test_the_longest_delay_of_the_event_loop_is_told_once():
    lag = LoopLag()
    lag.start()
    await asyncio.sleep(0.05)
    lag.take()
    time.sleep(0.2)
    await asyncio.sleep(0.03)
    assert 0.18 <= lag.take() < 1.0
    await asyncio.sleep(0.03)
    assert lag.take() < 0.15
    lag.stop()


def is_running(pid: int) -> bool:
    """A process that has ended but was not waited for (it is somebody else's child) does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
