"""The queue of uploaded files: nothing is lost, doubled or half there, whatever is withdrawn, damaged or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path

import pytest

import index
from index import Catalogue, ChunkingConfig, Document, Ingestor, Section, StorageFull
from index.attached_files import AttachedFile, Attachment
from index.ingest_job import ingest_job
from index.ingest_queue import IngestJob, IngestQueue
from index.library import Library
from index.types import file_of

RECORDS = [{"id": f"r{i}", "title": f"Title {i}", "text": f"Text number {i} of the file."} for i in range(5)]


@pytest.fixture
def library(catalogue, data_dir) -> Library:
    return Library(catalogue, data_dir)


@pytest.fixture
def queue(catalogue, data_dir) -> IngestQueue:
    return IngestQueue(catalogue, data_dir)


@pytest.fixture
def ingestor(catalogue, word_encoder, embedder) -> Ingestor:
    """It stores two chunks at a time, so that a file of several is in between for a while."""
    return Ingestor(catalogue, word_encoder, embedder, ChunkingConfig(64), batch_chunks=2)


@pytest.fixture
def upload(library):
    """upload(name, content) → file id; content is text, bytes, or records for a JSONL file."""

    def send(name: str, content: str | bytes | list[dict[str, object]]) -> str:
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        begun = library.files.begin()
        begun.write(content.encode() if isinstance(content, str) else content)
        return library.files.keep(begun, "", name, "assistants").id

    return send


@pytest.fixture
def attach(library, upload):
    """attach(name, content, **settings) → file id, waiting in collection 'c'."""

    def send(name: str, content: str | bytes | list[dict[str, object]], **settings: object) -> str:
        file_id = upload(name, content)
        library.attached.attach("c", "", Attachment(file_id, **settings))
        return file_id

    return send


@pytest.fixture
def work(queue, ingestor):
    """work() does the oldest job; what is called at each step of its progress may be given."""

    def do(progress=lambda _: None, look_every_s: float = 60.0) -> str:
        return ingest_job(queue.waiting()[0], queue, ingestor, progress, look_every_s)

    return do


@pytest.fixture
def state(library):
    def of(file_id: str) -> AttachedFile:
        return library.attached.get("c", "", file_id)

    return of


def texts(catalogue: Catalogue) -> list[str]:
    return sorted(stored.chunk.text for stored in catalogue.chunks("c"))


def test_jobs_wait_in_the_order_in_which_they_came_with_all_that_they_need(queue, attach, data_dir):
    first = attach("a.txt", "One.", attributes={"year": 1961}, chunk_tokens=100, chunk_overlap_tokens=50)
    second = attach("b.txt", "Two.")
    assert queue.waiting() == [
        IngestJob("c", first, "a.txt", data_dir.files / first, {"year": 1961}, 100, 50),
        IngestJob("c", second, "b.txt", data_dir.files / second),
    ]
    assert queue.waiting(1) == queue.waiting()[:1]


def test_a_completed_file_is_searchable_under_its_own_name_with_its_attributes(work, attach, catalogue, queue, state):
    record = {"id": "x", "title": "T", "text": "A text.", "year": 1961, "kind": "found"}
    file_id = attach("notes.jsonl", [record], attributes={"kind": "given", "who": "me"})
    assert work() == "completed"
    (document,) = catalogue.documents("c")
    assert file_of(document.document_id) == file_id
    assert document.source == "notes.jsonl#x"
    assert document.metadata == {"year": 1961, "kind": "given", "who": "me"}
    assert (state(file_id).status, state(file_id).error_code, queue.waiting()) == ("completed", None, [])


def test_a_file_has_the_chunk_sizes_it_was_attached_with(work, attach, catalogue):
    attach("a.txt", "A sentence of it. " * 40)
    work()
    by_default = len(texts(catalogue))
    attach("b.txt", "A sentence of it. " * 40, chunk_tokens=32)
    work()
    assert len(texts(catalogue)) - by_default > by_default > 1


def test_attaching_it_again_in_another_way_replaces_what_was_there(work, attach, catalogue, library):
    file_id = attach("a.txt", "A sentence of it. " * 40)
    work()
    before = len(texts(catalogue))
    library.attached.attach("c", "", Attachment(file_id, attributes={"k": "v"}, chunk_tokens=32))
    assert work() == "completed"
    assert len(texts(catalogue)) > before
    assert [d.metadata for d in catalogue.documents("c")] == [{"k": "v"}]


def test_documents_that_the_file_does_not_hold_are_gone_when_it_is_complete(work, attach, catalogue, ingestor):
    file_id = attach("r.jsonl", RECORDS)
    stray = Document(f"{file_id}-{'0' * 16}", "old", (Section("", "Old."),), "r.jsonl#old")
    other = Document("file-other", "other", (Section("", "Other."),), "other.txt")
    ingestor.add_documents([stray, other], "c")
    work()
    assert texts(catalogue) == ["Other.", *(r["text"] for r in RECORDS)]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("broken.pdf", b"%PDF-1.4\nthis is no PDF", "cannot be parsed as PDF"),
        ("broken.docx", b"PK\x03\x04 no archive", "cannot be parsed as DOCX"),
        ("noise.txt", bytes(range(256)) * 8, "holds NUL bytes"),
        ("latin.txt", "Grüße".encode("latin-1"), "is not valid UTF-8"),
        ("blank.txt", " \n ", "holds no text"),
        ("cut.jsonl", '{"text": "Good."}\n{"text": ', "line 2: malformed JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_failed_with_the_reason_and_leaves_nothing(
    work, attach, state, catalogue, data_dir, name, content, reason
):
    file_id = attach(name, content)
    assert work() == "failed"
    failed = state(file_id)
    assert (failed.status, failed.error_code) == ("failed", "invalid_file")
    assert failed.error_message.startswith(f"{name}: ") and reason in failed.error_message
    assert file_id not in failed.error_message and str(data_dir.path) not in failed.error_message
    assert texts(catalogue) == []


def test_an_empty_file_is_failed(work, attach, state, data_dir):
    file_id = attach("a.txt", "x")
    (data_dir.files / file_id).write_bytes(b"")
    assert work() == "failed"
    assert state(file_id).error_message.startswith("a.txt: is empty")


def test_bytes_that_we_have_lost_are_our_fault(work, attach, state, data_dir, caplog):
    file_id = attach("a.txt", "x")
    (data_dir.files / file_id).unlink()
    assert work() == "failed"
    assert state(file_id).error_code == "server_error"
    assert str(data_dir.path) not in state(file_id).error_message


def test_a_fault_of_ours_fails_the_file_without_its_details_and_the_queue_goes_on(
    work, attach, state, queue, ingestor, caplog
):
    file_id, _ = attach("a.txt", "x"), attach("b.txt", "y")

    def crash(_: object) -> None:
        raise KeyError("secret detail")

    assert work(crash) == "failed"
    assert state(file_id).error_code == "server_error"
    assert state(file_id).error_message.startswith("a.txt: could not be ingested (KeyError)")
    assert "secret detail" in caplog.text and "secret" not in state(file_id).error_message
    assert work() == "completed" and queue.waiting() == []


def test_running_out_of_memory_is_told_as_such(work, attach, state):
    file_id = attach("a.txt", "x")

    def exhaust(_: object) -> None:
        raise MemoryError

    assert work(exhaust) == "failed"
    assert "more memory" in state(file_id).error_message


def at_document(number: int, action) -> object:
    """A progress callback that runs `action` once, when so many documents have been read."""
    done = []

    def progress(now: index.IngestProgress) -> None:
        if now.num_documents == number and not done:
            done.append(action())

    return progress


@pytest.mark.parametrize("how", ["detached", "deleted"])
def test_a_file_that_goes_while_it_is_read_leaves_nothing_behind(work, attach, catalogue, library, how):
    file_id = attach("r.jsonl", RECORDS)

    def remove() -> None:
        assert texts(catalogue), "nothing was stored before"
        if how == "detached":
            library.attached.detach("c", "", file_id)
        else:
            library.files.delete(file_id, "")

    assert work(at_document(4, remove)) == "withdrawn"
    assert texts(catalogue) == []


def test_a_collection_deleted_while_a_file_is_read_is_not_made_again(work, attach, catalogue):
    attach("r.jsonl", RECORDS)
    assert work(at_document(3, lambda: catalogue.delete_collection("c"))) == "withdrawn"
    assert catalogue.collections() == []


def test_a_cancelled_file_leaves_nothing_behind(work, upload, library, catalogue):
    batch = library.attached.attach_batch("c", "", [Attachment(upload("r.jsonl", RECORDS))])
    outcome = work(at_document(4, lambda: library.attached.cancel_batch("c", "", batch.id)))
    assert (outcome, texts(catalogue)) == ("withdrawn", [])


def test_a_file_detached_and_attached_again_meanwhile_is_done_again_and_complete(
    work, attach, library, catalogue, state
):
    """What was stored before the detachment is gone with it, so the first run must not complete the file."""
    file_id = attach("r.jsonl", RECORDS)

    def again() -> None:
        library.attached.detach("c", "", file_id)
        library.attached.attach("c", "", Attachment(file_id))

    assert work(at_document(4, again)) == "waiting"
    assert work() == "completed"
    assert texts(catalogue) == [r["text"] for r in RECORDS]
    assert state(file_id).status == "completed"


def test_attributes_changed_meanwhile_are_those_that_are_stored(work, attach, library, catalogue, queue):
    file_id = attach("r.jsonl", RECORDS, attributes={"k": "old"})
    outcome = work(at_document(3, lambda: library.attached.update("c", "", file_id, {"k": "new"})))
    assert outcome == "withdrawn" and [j.attributes for j in queue.waiting()] == [{"k": "new"}]
    work()
    assert {d.metadata["k"] for d in catalogue.documents("c")} == {"new"} and len(texts(catalogue)) == 5


def test_a_long_job_notices_that_it_is_not_wanted_before_it_stores_anything(work, attach, library):
    file_id = attach("r.jsonl", RECORDS)
    read = []

    def progress(now: index.IngestProgress) -> None:
        read.append(now.num_documents)
        if now.num_documents == 2:
            library.files.delete(file_id, "")

    assert work(progress, look_every_s=0.0) == "withdrawn"
    assert max(read) == 2


def test_progress_tells_the_stage_and_how_far_it_is(work, attach):
    attach("r.jsonl", RECORDS)
    told: list[index.IngestProgress] = []
    work(told.append)
    assert {p.stage for p in told} == {"parsing", "chunking", "embedding", "storing"}
    assert [p.num_chunks_cut for p in told if p.stage == "embedding"][-1] == told[-1].num_chunks == 5


def test_documents_are_written_only_while_nobody_else_holds_the_data_directory(work, attach, data_dir, catalogue):
    attach("a.txt", "Text.")
    told: list[str] = []
    with data_dir.lock(exclusive=False):
        thread = threading.Thread(target=work, args=(lambda p: told.append(p.stage),))
        thread.start()
        until(lambda: told.count("storing") > 1)
        assert texts(catalogue) == []
    thread.join(5)
    assert texts(catalogue) == ["Text."]


def test_two_processes_never_work_on_one_queue_at_the_same_time(queue, data_dir, catalogue):
    order: list[str] = []

    def other() -> None:
        with IngestQueue(catalogue, data_dir).working():
            order.append("other")

    with queue.working():
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.5)
        order.append("this")
    thread.join(5)
    assert order == ["this", "other"]


def test_a_full_disk_fails_the_file_or_leaves_it_waiting_and_loses_nothing(work, attach, catalogue, state, queue):
    """SQLite's own page limit makes it report what it reports on a full disk."""
    attach("kept.txt", "Kept.")
    work()
    big = attach("big.txt", "word " * 10_000)
    with catalogue._database.read() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 3}")
    try:
        assert work() == "failed"
        assert "no space left" in state(big).error_message
    except StorageFull:  # not even that could be written
        assert [job.file_id for job in queue.waiting()] == [big]
    assert texts(catalogue) == ["Kept."]


def test_a_docx_that_unpacks_to_far_more_than_the_memory_limit_is_failed_within_it(tmp_path):
    """256 MiB of XML in half a MiB: the limit on the process's memory stops it, and is the reason that is told."""
    bomb = tmp_path / "bomb.docx"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "[Content_Types].xml",
            '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default Extension="rels" '
            'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName='
            '"/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.'
            'document.main+xml"/></Types>',
        )
        archive.writestr(
            "_rels/.rels",
            '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="1" '
            'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
            'Target="word/document.xml"/></Relationships>',
        )
        with archive.open("word/document.xml", "w") as part:
            part.write(b'<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>')
            for _ in range(256):
                part.write(b"<w:p/>" * ((1 << 20) // 6))
            part.write(b"</w:body></w:document>")
    code = """
        import resource, sys
        from conftest import HashingEmbedder, WordEncoder
        from index import Catalogue, DataDir, Ingestor
        from index.attached_files import Attachment
        from index.ingest_job import ingest_job
        from index.ingest_queue import IngestQueue
        from index.library import Library
        data_dir = DataDir(sys.argv[1])
        with Catalogue(data_dir.catalogue) as catalogue:
            catalogue.open_collection("c", "words-1", "hashing-1", 64)
            library, queue = Library(catalogue, data_dir), IngestQueue(catalogue, data_dir)
            upload = library.files.begin()
            upload.write(open(sys.argv[2], "rb").read())
            file_id = library.files.keep(upload, "", "bomb.docx", "assistants").id
            library.attached.attach("c", "", Attachment(file_id))
            resource.setrlimit(resource.RLIMIT_DATA, (300 << 20, 300 << 20))
            ingest_job(queue.waiting()[0], queue, Ingestor(catalogue, WordEncoder(), HashingEmbedder()), lambda _: None)
            print(library.attached.get("c", "", file_id).error_message)
    """
    done = run(code, tmp_path / "data", bomb)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bomb.docx: takes more memory than the server gives to one file")


def test_killed_in_the_middle_of_a_file_it_goes_on_where_it_stopped(tmp_path):
    """SIGKILL when its second batch is embedded; the next process stores what is missing, and nothing twice."""
    records = "".join(json.dumps({"text": f"Text number {i}."}) + "\n" for i in range(8))
    code = """
        import os, signal, sys
        from conftest import HashingEmbedder, WordEncoder
        from index import Catalogue, DataDir, Ingestor
        from index.attached_files import Attachment
        from index.ingest_job import ingest_job
        from index.ingest_queue import IngestQueue
        from index.library import Library
        class Killer(HashingEmbedder):
            batches = 0
            def embed(self, texts, progress=None):
                self.batches += 1
                if self.batches == int(sys.argv[3]):
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().embed(texts, progress)
        data_dir = DataDir(sys.argv[1])
        with Catalogue(data_dir.catalogue) as catalogue:
            catalogue.open_collection("c", "words-1", "hashing-1", 64)
            library, queue = Library(catalogue, data_dir), IngestQueue(catalogue, data_dir)
            if not queue.waiting():
                upload = library.files.begin()
                upload.write(sys.argv[2].encode())
                library.attached.attach("c", "", Attachment(library.files.keep(upload, "", "r.jsonl", "assistants").id))
            embedder = Killer()
            ingestor = Ingestor(catalogue, WordEncoder(), embedder, batch_chunks=2)
            ingest_job(queue.waiting()[0], queue, ingestor, lambda _: None)
            print(embedder.num_texts, sorted(s.chunk.text for s in catalogue.chunks("c")))
    """
    assert run(code, tmp_path, records, 3).returncode == -signal.SIGKILL
    done = run(code, tmp_path, records, 0)
    assert done.stdout.strip() == f"4 {[f'Text number {i}.' for i in range(8)]}"


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    path = f"{Path(index.__file__).parents[1]}:{Path(__file__).parent}"
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
