"""The catalogue: documents change whole, chunks are shared, revisions rise, foreign files are refused."""

import sqlite3
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import index
from index import (
    Catalogue,
    CatalogueError,
    CatalogueVersionError,
    Chunk,
    CollectionMismatch,
    CollectionNotFound,
    Document,
    InvalidValue,
    Section,
    StorageFull,
    chunk_id_of,
)

# Collections


def test_a_collection_is_made_once_and_found_again(data_dir):
    with Catalogue(data_dir.catalogue) as catalogue:
        made = catalogue.open_collection("c", "enc", "emb", 4)
        assert catalogue.open_collection("c", "enc", "emb", 4) == made
        catalogue.open_collection("a", "enc", "emb", 4)
    with Catalogue(data_dir.catalogue) as catalogue:
        assert [c.name for c in catalogue.collections()] == ["a", "c"]
        assert catalogue.collection("c") == made


def test_a_missing_collection_is_named_with_those_that_exist(catalogue):
    for call in (
        lambda: catalogue.collection("x"),
        lambda: catalogue.open_collection("x", "enc", "emb", 4, create=False),
        lambda: catalogue.document_hash("x", "d"),
        lambda: list(catalogue.chunks("x")),
        lambda: catalogue.delete_collection("x"),
    ):
        with pytest.raises(CollectionNotFound, match=r"'x' does not exist \(existing: c\)"):
            call()


@pytest.mark.parametrize(
    ("encoder", "embedding", "dim", "what"),
    [("other", "hashing-1", 64, "encoder"), ("words-1", "other", 64, "embedding"), ("words-1", "hashing-1", 65, "emb")],
)
def test_another_encoder_or_embedding_model_is_refused_with_both_names(catalogue, encoder, embedding, dim, what):
    with pytest.raises(CollectionMismatch, match=f"{what}.*'.*-1'.*new collection"):
        catalogue.open_collection("c", encoder, embedding, dim)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ü", "x" * 65, "a\n"])
def test_a_name_that_is_no_file_name_is_refused(catalogue, name):
    with pytest.raises(InvalidValue, match="collection"):
        catalogue.open_collection(name, "enc", "emb", 4)


def test_a_collection_made_anew_under_an_old_name_is_another_one(catalogue, add):
    add("d", "one")
    before = catalogue.collection("c")
    catalogue.delete_collection("c")
    after = catalogue.open_collection("c", "words-1", "hashing-1", 64)
    assert after.collection_id != before.collection_id
    assert list(catalogue.chunks("c")) == [] and after.revision == 0


# Documents and chunks

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20).map(tuple)


@given(
    tokens=st.lists(TOKENS, max_size=4), texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=4)
)
def test_what_is_stored_is_what_is_read(tokens, texts, tmp_path_factory):
    with Catalogue(tmp_path_factory.mktemp("catalogue") / "c.sqlite") as catalogue:
        catalogue.open_collection("c", "enc", "emb", 3)
        document = Document("d", texts[0], (Section("", texts[1]),), "s", {"year": 1, "ok": True, "x": "é"})
        chunks = [Chunk(texts[2], texts[3], ids, "d", i, page=i or None) for i, ids in enumerate(tokens)]
        vectors = np.random.default_rng(0).standard_normal((len(chunks), 3)).astype(np.float32)
        catalogue.replace_document("c", document, chunks, vectors, ingest_hash="h")
        stored = list(catalogue.chunks("c"))
        row_ids, read = catalogue.vectors("c")
        assert [s.chunk for s in stored] == chunks
        assert row_ids.tolist() == catalogue.row_ids("c").tolist() == [s.row_id for s in stored]
        assert read.tobytes() == vectors.tobytes() and read.dtype == np.float32
        assert catalogue.document_hash("c", "d") == "h"
        (info,) = catalogue.documents("c")
        assert (info.title, info.metadata, info.num_chunks) == (texts[0], dict(document.metadata), len(chunks))


def test_a_replaced_document_leaves_nothing_of_the_old_one_and_no_row_id_comes_back(catalogue, add):
    one, two = add("d", "one", "two")
    before = set(catalogue.row_ids("c").tolist())
    add("d", "two", "three")
    assert [s.chunk.text for s in catalogue.chunks("c")] == ["two", "three"]
    assert before.isdisjoint(catalogue.row_ids("c").tolist())
    assert catalogue.chunk("c", one) is None and catalogue.chunk("c", two) is not None


def test_a_chunk_shared_by_two_documents_survives_the_deletion_of_one(catalogue, add):
    shared, own = add("d", "shared", "own")
    assert add("e", "shared") == [shared]
    assert catalogue.delete_document("c", "d").chunk_ids == (own,)
    assert catalogue.chunk("c", shared).chunk.document_id == "e"
    assert catalogue.delete_document("c", "e").chunk_ids == (shared,)
    assert catalogue.counts("c").num_documents == 0


def test_only_changes_raise_the_revision(catalogue, add):
    revisions = [catalogue.collection("c").revision]

    def after(change):
        change()
        revisions.append(catalogue.collection("c").revision)
        return revisions[-1] - revisions[-2]

    assert after(lambda: add("d", "one")) == 1
    assert after(lambda: catalogue.delete_document("c", "missing")) == 0
    assert after(lambda: list(catalogue.chunks("c"))) == 0
    assert after(lambda: add("d", "two")) > 0
    assert after(lambda: catalogue.delete_document("c", "d")) == 1


def test_collections_do_not_see_each_others_documents(catalogue, add):
    catalogue.open_collection("other", "words-1", "hashing-1", 64)
    (chunk_id,) = add("d", "one")
    add("d", "two", collection="other")
    assert [s.chunk.text for s in catalogue.chunks("c")] == ["one"]
    assert catalogue.chunk("other", chunk_id) is None
    (row,) = catalogue.row_ids("other").tolist()
    assert catalogue.chunks_by_row("c", [row]) == {}
    catalogue.delete_collection("other")
    assert catalogue.counts("c").num_chunks == 1


def test_chunks_and_vectors_are_found_by_row_and_missing_rows_are_left_out(catalogue, add):
    add("d", "one", "two")
    first, second = catalogue.row_ids("c").tolist()
    assert {r: s.chunk.text for r, s in catalogue.chunks_by_row("c", [second, 999, first]).items()} == {
        first: "one",
        second: "two",
    }
    rows, vectors = catalogue.vectors("c", [second, 999])
    assert rows.tolist() == [second] and np.array_equal(vectors, catalogue.vectors("c")[1][1:])


def test_iterating_over_many_chunks_is_not_disturbed_by_changes_meanwhile(catalogue, add):
    for i in range(3):
        add(f"d{i}", *(f"text {i} {j}" for j in range(300)))
    seen = []
    for stored in catalogue.chunks("c"):
        seen.append(stored.row_id)
        if len(seen) == 10:
            catalogue.delete_document("c", "d2")
    assert seen == sorted(set(seen)) and len(seen) == 600


def test_vectors_of_another_shape_are_refused_and_nothing_changes(catalogue, add):
    add("d", "one")
    document = Document("d", "d", (), "d")
    with pytest.raises(InvalidValue, match="vectors"):
        catalogue.replace_document("c", document, [], np.zeros((1, 64), np.float32))
    assert [s.chunk.text for s in catalogue.chunks("c")] == ["one"]


def test_counts_are_over_different_chunks(catalogue, add):
    add("d", "one two", "same")
    add("e", "same")
    counts = catalogue.counts("c")
    assert (counts.num_documents, counts.num_chunks) == (2, 2)
    assert counts.num_chunk_tokens == sum(
        {s.chunk.chunk_id: s.chunk.num_tokens for s in catalogue.chunks("c")}.values()
    )


def test_a_chunk_id_depends_on_the_tokens_alone():
    assert Chunk("a", "b", (1, 2), "d", 0).chunk_id == Chunk("x", "y", (1, 2), "e", 5).chunk_id == chunk_id_of([1, 2])
    assert chunk_id_of([1, 2]) != chunk_id_of([258])


# Transactions, threads, processes


def test_an_error_in_the_middle_of_a_change_leaves_the_old_state(catalogue, add):
    add("d", "one")
    bad = Chunk("", "two", (1,), "d", 0)
    before = catalogue.collection("c")
    with pytest.raises(CatalogueError, match="UNIQUE"):
        catalogue.replace_document("c", Document("d", "d", (), "d"), [bad, bad], np.zeros((2, 64), np.float32))
    assert [s.chunk.text for s in catalogue.chunks("c")] == ["one"]
    assert catalogue.collection("c") == before


def test_a_full_disk_is_named_and_loses_nothing(catalogue, add):
    """SQLite's own page limit makes it report what it reports on a full disk."""
    add("d", "one")
    with catalogue._database.read() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 5}")
    with pytest.raises(StorageFull, match="no space left"):
        add("e", *(f"text {i} " * 500 for i in range(50)))
    assert [s.chunk.text for s in catalogue.chunks("c")] == ["one"]
    add("f", "small")


def test_threads_write_and_read_at_the_same_time(catalogue, add):
    def work(i: int) -> int:
        add(f"d{i % 4}", f"text {i}")
        return len(list(catalogue.chunks("c")))

    with ThreadPoolExecutor(4) as threads:
        seen = list(threads.map(work, range(40)))
    assert all(1 <= n <= 4 for n in seen)
    assert catalogue.counts("c").num_documents == 4
    assert catalogue.collection("c").revision >= 40


def test_processes_make_and_fill_one_catalogue_at_the_same_time(tmp_path):
    code = """
        import sys, numpy as np
        from index import Catalogue, Chunk, Document
        with Catalogue(sys.argv[1]) as catalogue:
            catalogue.open_collection("c", "enc", "emb", 2)
            for i in range(10):
                name = f"{sys.argv[2]}-{i}"
                chunk = Chunk("", name, (i,), name, 0)
                catalogue.replace_document("c", Document(name, name, (), name), [chunk], np.ones((1, 2), np.float32))
    """
    path = tmp_path / "c.sqlite"
    root = Path(index.__file__).parents[1]
    workers = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(path), str(i)], cwd=root) for i in range(4)
    ]
    assert [worker.wait() for worker in workers] == [0, 0, 0, 0]
    with Catalogue(path) as catalogue:
        assert catalogue.counts("c").num_documents == 40
        assert catalogue.collection("c").revision == 40


# Files that are not ours


def test_a_catalogue_of_another_schema_version_is_refused_and_left_alone(data_dir):
    Catalogue(data_dir.catalogue).close()
    with sqlite3.connect(data_dir.catalogue) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(CatalogueVersionError, match="version 99, this program reads version 2"):
        Catalogue(data_dir.catalogue)


def test_a_sqlite_file_of_another_program_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "c.sqlite") as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    with pytest.raises(CatalogueVersionError):
        Catalogue(tmp_path / "c.sqlite")


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "c.sqlite").write_text("not a database, but long enough to be read as the header of one" * 50)
    with pytest.raises(CatalogueError, match="is it a catalogue"):
        Catalogue(tmp_path / "c.sqlite")


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(CatalogueError, match="check the disk"):
        Catalogue(tmp_path / "missing" / "c.sqlite")
