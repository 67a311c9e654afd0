"""Ingest: idempotent, exact about what changed, and never with half a document behind it."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import index
from index import (
    Catalogue,
    ChunkingConfig,
    CollectionMismatch,
    Document,
    DocumentError,
    IngestFailure,
    Ingestor,
    IngestReport,
    Section,
    StorageFull,
    UnsupportedFormat,
    ingest,
)
from index.ingest import embedding_text


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Two text files, one JSONL file of three records, one file of unknown format."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("Text of a.")
    (folder / "b.md").write_text("# B\nText of b.")
    (folder / "photo.jpg").write_text("")
    write_records(folder, "one", "two", "three")
    return folder


def write_records(folder: Path, *ids: str, text: str = "") -> None:
    lines = (json.dumps({"id": i, "title": i, "text": text or f"Text of {i}."}) for i in ids)
    (folder / "records.jsonl").write_text("\n".join(lines))


@pytest.fixture
def run(catalogue, word_encoder, embedder):
    """run(path, …): an ingest into collection 'c'."""

    def run_ingest(*paths, chunking=None, **options) -> IngestReport:
        return ingest(paths, "c", catalogue, word_encoder, embedder, chunking, **options)

    return run_ingest


def texts(catalogue: Catalogue) -> list[str]:
    return sorted(stored.chunk.text for stored in catalogue.chunks("c"))


def test_everything_is_added_once_and_unknown_formats_are_reported(run, corpus, catalogue, embedder):
    report = run(corpus)
    assert report == IngestReport(num_added=5, num_chunks=5, unsupported=(str(corpus / "photo.jpg"),))
    assert texts(catalogue) == ["Text of a.", "Text of b.", "Text of one.", "Text of three.", "Text of two."]
    revision = catalogue.collection("c").revision
    assert run(corpus) == IngestReport(num_unchanged=5, unsupported=report.unsupported)
    assert (catalogue.collection("c").revision, embedder.num_texts) == (revision, 5)


def test_what_changed_is_replaced_and_nothing_else_is_touched(run, corpus, catalogue):
    run(corpus)
    kept = {s.row_id for s in catalogue.chunks("c") if s.chunk.text != "Text of a."}
    (corpus / "a.txt").write_text("Changed.")
    report = run(corpus)
    assert (report.num_changed, report.num_unchanged, report.num_chunks) == (1, 4, 1)
    assert kept < set(catalogue.row_ids("c").tolist())
    assert "Changed." in texts(catalogue) and "Text of a." not in texts(catalogue)


def test_a_record_that_left_its_file_is_removed_and_those_of_other_files_stay(run, corpus, catalogue):
    run(corpus)
    write_records(corpus, "two", "four")
    report = run(corpus / "records.jsonl")
    assert (report.num_added, report.num_unchanged, report.num_removed) == (1, 1, 2)
    assert texts(catalogue) == ["Text of a.", "Text of b.", "Text of four.", "Text of two."]


def test_other_chunking_or_metadata_is_a_change(run, corpus, catalogue):
    record = {"title": "T", "text": "word " * 40}
    path = corpus / "x.json"
    path.write_text(json.dumps([record]))
    run(path)
    assert run(path, chunking=ChunkingConfig(32)).num_changed == 1
    assert catalogue.counts("c").num_chunks > 1
    path.write_text(json.dumps([record | {"year": 1961}]))
    assert run(path, chunking=ChunkingConfig(32)).num_changed == 1
    assert catalogue.documents("c")[0].metadata == {"year": 1961}


def test_a_file_that_cannot_be_read_is_reported_and_keeps_what_it_had(run, corpus, catalogue):
    run(corpus)
    (corpus / "a.txt").write_bytes(b"\x00\x01")
    (corpus / "records.jsonl").write_text('{"id": "one", "text": "New."}\n{"text": \n')
    report = run(corpus)
    assert [Path(f.path).name for f in report.failed] == ["a.txt", "records.jsonl"]
    assert isinstance(report.failed[0], IngestFailure) and "line 2" in report.failed[1].reason
    assert (report.num_changed, report.num_removed) == (1, 0)
    assert texts(catalogue) == ["New.", "Text of a.", "Text of b.", "Text of three.", "Text of two."]


def test_a_named_path_that_cannot_be_read_is_an_error_before_anything_is_done(run, corpus, catalogue):
    with pytest.raises(UnsupportedFormat):
        run(corpus, corpus / "photo.jpg")
    with pytest.raises(DocumentError):
        run(corpus, corpus / "missing.txt")
    assert texts(catalogue) == []


def test_each_chunk_is_stored_with_the_vector_of_its_title_and_text(run, corpus, catalogue, embedder):
    (corpus / "long.txt").write_text("A sentence of it. " * 100 + "Another one. " * 100)
    run(corpus, chunking=ChunkingConfig(64))
    row_ids, vectors = catalogue.vectors("c")
    stored = catalogue.chunks_by_row("c", row_ids)
    assert len(stored) > 20
    expected = embedder.embed([embedding_text(stored[r].chunk) for r in row_ids.tolist()])
    assert np.array_equal(vectors, expected)


def test_progress_ends_with_everything_done(run, corpus):
    told = []
    run(corpus, progress=told.append)
    assert told[-1].num_chunks == 5
    assert max(p.num_files_read for p in told) == told[-1].num_files == 3
    assert max(p.num_documents for p in told) == 5
    assert [p.num_chunks for p in told] == sorted(p.num_chunks for p in told)


def test_an_encoder_or_embedder_other_than_the_collections_is_refused(corpus, catalogue, byte_encoder, embedder):
    with pytest.raises(CollectionMismatch, match=r"words-1.*bytes-1"):
        ingest([corpus], "c", catalogue, byte_encoder, embedder)


def test_documents_that_are_no_files_are_added_and_replaced_alike(catalogue, word_encoder, embedder):
    ingestor = Ingestor(catalogue, word_encoder, embedder)

    def document(text: str) -> Document:
        return Document("upload-1", "Upload", (Section("", text),), "upload.txt")

    assert ingestor.add_documents([document("One.")], "new").num_added == 1
    assert ingestor.add_documents([document("One.")], "new").num_unchanged == 1
    assert ingestor.add_documents([document("Two.")], "new").num_changed == 1
    assert [s.chunk.text for s in catalogue.chunks("new")] == ["Two."]


def test_a_full_disk_is_named_and_keeps_what_was_stored(run, corpus, catalogue):
    """SQLite's own page limit makes it report what it reports on a full disk."""
    run(corpus)
    with catalogue._database.read() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 3}")
    (corpus / "big.txt").write_text("word " * 50_000)
    with pytest.raises(StorageFull, match="no space left"):
        run(corpus)
    assert len(texts(catalogue)) == 5


def test_killed_in_the_middle_it_leaves_whole_documents_and_the_next_run_goes_on(tmp_path, word_encoder, embedder):
    """The process kills itself (SIGKILL) when it embeds its third batch."""
    (tmp_path / "corpus").mkdir()
    for i in range(6):
        (tmp_path / "corpus" / f"{i}.txt").write_text(" ".join(f"word{i}x{j}." for j in range(7000)))
    code = """
        import os, signal, sys
        from conftest import HashingEmbedder, WordEncoder
        from index import Catalogue, ChunkingConfig, ingest
        class Killer(HashingEmbedder):
            num_batches = 0
            def embed(self, texts, progress=None):
                self.num_batches += 1
                if self.num_batches == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().embed(texts, progress)
        with Catalogue(sys.argv[1]) as catalogue:
            ingest([sys.argv[2]], "c", catalogue, WordEncoder(), Killer(), ChunkingConfig(64))
    """
    paths = [str(tmp_path / "c.sqlite"), str(tmp_path / "corpus")]
    source = {"PYTHONPATH": f"{Path(index.__file__).parents[1]}:{Path(__file__).parent}"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *paths], env=source)
    assert done.returncode == -signal.SIGKILL
    with Catalogue(paths[0]) as catalogue:
        stored = catalogue.counts("c").num_documents
        assert 0 < stored < 6
        report = ingest(paths[1:], "c", catalogue, word_encoder, embedder, ChunkingConfig(64))
        assert (report.num_unchanged, report.num_added) == (stored, 6 - stored)
        by_document: dict[str, list[str]] = {}
        for item in catalogue.chunks("c"):
            by_document.setdefault(item.chunk.title, []).extend(item.chunk.text.split())
        assert by_document == {str(i): [f"word{i}x{j}." for j in range(7000)] for i in range(6)}
