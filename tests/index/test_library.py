"""The library: files and vector stores, each its owner's only, whole or not at all, and gone when they are deleted."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index import Document, InvalidValue
from index.errors import NotFound
from index.library import Library
from index.library_types import Attachment, MadeWith, VectorStoreSettings
from index.paging import PageRequest, made_at, new_id, read_page
from index.types import KVObject, file_of

HERE = Path(__file__).parent
MADE_WITH = MadeWith("words-1", "hashing-1", 64)
NOBODYS_FILE, NOBODYS_STORE, NOBODYS_BATCH = "file-" + "0" * 24, "vs_" + "0" * 24, "vsfb_" + "0" * 24


@pytest.fixture
def library(catalogue, data_dir) -> Library:
    return Library(catalogue, data_dir)


@pytest.fixture
def upload(library):
    def send(name="a.txt", content=b"some text", owner="", **more) -> str:
        incoming = library.files.begin()
        incoming.write(content)
        return library.files.keep(incoming, owner, name, more.pop("purpose", "assistants"), **more).id

    return send


@pytest.fixture
def store(library):
    def make(*file_ids: str, owner="", **settings) -> str:
        attachments = [Attachment(file_id) for file_id in file_ids]
        return library.vector_stores.create(owner, VectorStoreSettings(**settings), MADE_WITH, attachments).id

    return make


@pytest.fixture
def ingested(catalogue, add):
    """ingested(store, file_id, 'text', …): what an ingest leaves behind; returns the chunk ids."""

    def finish(vector_store: str, file_id: str, *texts: str, document_id: str = "") -> list[str]:
        chunk_ids = add(document_id or file_id, *texts, collection=vector_store)
        with catalogue.database.write() as connection:
            connection.execute("UPDATE collection_files SET status = 'completed' WHERE file_id = ?", (file_id,))
        return chunk_ids

    return finish


def set_time(catalogue, store_id: str, last_active_at: int) -> None:
    with catalogue.database.write() as connection:
        connection.execute("UPDATE collections SET last_active_at = ? WHERE name = ?", (last_active_at, store_id))


# files


def test_a_file_is_kept_byte_for_byte_under_its_id_readable_by_its_owner_only(library, upload, data_dir):
    file_id = upload("Geheim.PDF", b"\x00\xff" * 1000)
    stored, content = library.files.open(file_id, "")
    with content:
        assert content.read() == b"\x00\xff" * 1000
    assert (stored.filename, stored.num_bytes, stored.purpose) == ("Geheim.PDF", 2000, "assistants")
    assert abs(stored.created_at - time.time()) < 60
    (path,) = data_dir.files.iterdir()
    assert (path.name, path.stat().st_mode & 0o777) == (file_id, 0o600)
    assert data_dir.files.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\a b.txt", "a b.txt"),
        ("Übersicht – 2024.md", "Übersicht – 2024.md"),
        ("line\nbreak\x1b[2J.txt", "linebreak[2J.txt"),
        (" padded.txt ", "padded.txt"),
    ],
)
def test_a_file_name_is_never_a_path_and_can_be_shown_anywhere(library, upload, sent, kept):
    assert library.files.get(upload(sent), "").filename == kept


@pytest.mark.parametrize(("name", "content"), [("a.txt", b""), ("", b"x"), ("a/", b"x"), ("x" * 256, b"x")])
def test_a_file_without_bytes_or_a_usable_name_is_refused_and_nothing_stays(library, upload, data_dir, name, content):
    incoming = library.files.begin()
    incoming.write(content)
    with pytest.raises(InvalidValue, match="file"):
        library.files.keep(incoming, "", name, "assistants")
    incoming.discard()
    assert list(data_dir.files.iterdir()) == []
    assert library.files.page("", PageRequest()).items == ()


def test_an_upload_is_invisible_until_it_is_kept_and_discarding_it_afterwards_changes_nothing(library, data_dir):
    incoming = library.files.begin()
    incoming.write(b"half")
    assert library.files.page("", PageRequest()).items == ()
    with pytest.raises(NotFound):
        library.files.get(incoming.id, "")
    kept = library.files.keep(incoming, "", "a.txt", "assistants")
    incoming.discard()
    library.files.open(kept.id, "")[1].close()


def test_discarding_waits_for_a_write_that_is_under_way_in_another_thread(library, data_dir):
    incoming = library.files.begin()
    failures = []

    def write_on() -> None:
        try:
            while True:
                incoming.write(b"x" * 100_000)
        except ValueError:  # written to a closed file: the only way in which it may end
            failures.append("closed")

    writer = threading.Thread(target=write_on)
    writer.start()
    time.sleep(0.02)
    incoming.discard()
    writer.join(10)
    assert failures == ["closed"] and list(data_dir.files.iterdir()) == []


def test_two_uploads_of_one_file_are_two_files(library, upload):
    first, second = upload(), upload()
    assert first != second
    library.files.delete(first, "")
    library.files.open(second, "")[1].close()


def test_an_expired_file_is_unknown_at_once_and_its_bytes_and_documents_go_with_the_next_sweep(
    library, catalogue, upload, store, ingested, data_dir
):
    file_id, kept = upload(expires_after_s=3600), upload(expires_after_s=7200)
    vector_store = store(file_id, kept)
    ingested(vector_store, file_id, "gone soon")
    ingested(vector_store, kept, "stays")
    with catalogue.database.write() as connection:
        connection.execute("UPDATE files SET expires_at = ? WHERE id = ?", (int(time.time()), file_id))
    with pytest.raises(NotFound):
        library.files.get(file_id, "")
    with pytest.raises(NotFound):
        library.attached.attach(vector_store, "", Attachment(file_id))
    assert [f.id for f in library.files.page("", PageRequest()).items] == [kept]
    library.sweep()
    assert [path.name for path in data_dir.files.iterdir()] == [kept]
    assert [d.document_id for d in catalogue.documents(vector_store)] == [kept]
    assert library.vector_stores.get(vector_store, "").file_counts.total == 1


def test_a_sweep_removes_what_a_crash_left_but_no_upload_under_way(library, upload, data_dir):
    kept = upload()
    for name, age_s in (("file-1.tmp", 7200), ("file-" + "1" * 24, 7200), ("file-2.tmp", 60), (kept, 7200)):
        path = data_dir.files / name
        path.touch(mode=0o600)
        os.utime(path, (time.time() - age_s,) * 2)
    library.sweep()
    assert {path.name for path in data_dir.files.iterdir()} == {kept, "file-2.tmp"}


def test_a_full_disk_is_named_and_an_upload_leaves_nothing_there(tmp_path):
    unshare = shutil.which("unshare")
    mounted = f"mount -t tmpfs -o size=2m tmpfs {tmp_path}"  # gone with its namespace
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here (needs unshare and user namespaces)")
    script = f"{mounted} && '{sys.executable}' '{HERE}/upload_to_full_disk.py' {tmp_path}"
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=HERE.parents[1], timeout=60
    )
    assert done.stdout.splitlines() == ["StorageFull", "0 files", "kept 1000 bytes"], done.stderr


# deleting


@pytest.fixture
def booked(catalogue, library, upload, store, ingested):
    """One file in two vector stores, with KV, and a fused object of another file's chunk that saw its chunk."""
    file_id, other = upload("a.jsonl"), upload("b.txt")
    stores = store(file_id, other), store(file_id)
    for n, each in enumerate(stores):
        chunk, *_ = ingested(each, file_id, f"text {n}", "more", document_id=f"{file_id}-{'0' * 16}")
        catalogue.record_kv(each, [KVObject(f"raw{n}", chunk, "raw", 100)])
    (neighbour,) = ingested(stores[0], other, "neighbour")
    (first,) = [c.chunk.chunk_id for c in catalogue.chunks(stores[0]) if c.chunk.text == "text 0"]
    catalogue.record_kv(stores[0], [KVObject("fused", neighbour, "fused", 50, (first,))])
    return file_id, other, stores


def test_deleting_a_file_takes_its_passages_and_kv_from_every_vector_store_and_its_bytes(
    library, catalogue, booked, data_dir
):
    file_id, other, stores = booked
    library.files.delete(file_id, "")
    assert [path.name for path in data_dir.files.iterdir()] == [other]
    assert [d.document_id for d in catalogue.documents(stores[0])] == [other]
    assert catalogue.documents(stores[1]) == []
    assert catalogue.kv_garbage() == ["raw0", "raw1"]
    (left,) = catalogue.kv_objects(stores[0])
    assert (left.digest, left.is_stale) == ("fused", True)
    assert [library.vector_stores.get(s, "").file_counts.total for s in stores] == [1, 0]
    with pytest.raises(NotFound):
        library.files.delete(file_id, "")


def test_a_deletion_that_breaks_off_has_deleted_nothing(library, catalogue, booked, data_dir):
    """Broken off by the database itself, at the very last statement: a trigger refuses to let the row go."""
    file_id, _, stores = booked
    with catalogue.database.write() as connection:
        connection.execute("CREATE TRIGGER refuse BEFORE DELETE ON files BEGIN SELECT RAISE(ABORT, 'no'); END")
    before = [catalogue.counts(s) for s in stores]
    with pytest.raises(Exception, match="no"):
        library.files.delete(file_id, "")
    assert [catalogue.counts(s) for s in stores] == before
    assert catalogue.kv_garbage() == []
    library.files.open(file_id, "")[1].close()


def test_deleting_a_vector_store_takes_all_but_the_files_themselves(library, catalogue, booked, data_dir):
    file_id, other, stores = booked
    data_dir.index_file(stores[0]).write_bytes(b"vectors")
    library.vector_stores.delete(stores[0], "")
    with pytest.raises(NotFound):
        library.vector_stores.get(stores[0], "")
    assert not data_dir.index_file(stores[0]).exists()
    assert {f.id for f in library.files.page("", PageRequest()).items} == {file_id, other}
    assert sorted(catalogue.kv_garbage()) == ["fused", "raw0"]
    assert library.attached.get(stores[1], "", file_id).status == "completed"


def test_a_sweep_removes_vector_indexes_whose_collection_is_gone(library, store, data_dir):
    alive = store()
    for name in (alive, NOBODYS_STORE, "wiki"):
        data_dir.index_file(name).write_bytes(b"vectors")
    library.sweep()
    assert {path.stem for path in data_dir.faiss.iterdir()} == {alive, "wiki"}


# vector stores


def test_a_new_vector_store_says_what_it_was_told_and_is_empty(library):
    settings = VectorStoreSettings("Planets", "about planets", {"team": "a"}, 7)
    made = library.vector_stores.create("alice", settings, MADE_WITH)
    assert library.vector_stores.get(made.id, "alice") == made
    assert (made.settings, made.file_counts.total, made.passage_bytes) == (settings, 0, 0)
    assert made.expires_at == made.created_at + 7 * 86_400 and made.last_active_at == made.created_at


def test_one_unknown_file_and_no_vector_store_is_made_and_no_batch_attached(library, upload, store):
    known, existing = upload(), store()
    for file_ids in ((known, NOBODYS_FILE), (known, upload(owner="bob"))):
        with pytest.raises(NotFound, match=file_ids[1]):
            store(*file_ids)
        with pytest.raises(NotFound, match=file_ids[1]):
            library.attached.attach_batch(existing, "", [Attachment(f) for f in file_ids])
    assert {s.id for s in library.vector_stores.page("", PageRequest()).items} == {existing, "c"}
    assert library.attached.page(existing, "", PageRequest()).items == ()


def test_collections_of_the_command_line_are_the_operators_vector_stores(library, add):
    add("doc", "one", "two")
    made = library.vector_stores.get("c", "")
    assert (made.size.num_documents, made.size.num_chunks) == (1, 2)
    with pytest.raises(NotFound):
        library.vector_stores.get("c", "alice")


def test_the_size_follows_the_passages_and_the_kv(library, catalogue, upload, store, ingested):
    file_id = upload()
    vector_store = store(file_id)
    assert library.vector_stores.get(vector_store, "").passage_bytes == 0
    chunk, _ = ingested(vector_store, file_id, "fünf", "six")
    tokens = sum(len(c.chunk.token_ids) for c in catalogue.chunks(vector_store))
    expected = len("fünfsix".encode()) + 4 * tokens + 2 * 4 * 64
    assert library.vector_stores.get(vector_store, "").passage_bytes == expected
    assert library.attached.get(vector_store, "", file_id).passage_bytes == expected
    catalogue.record_kv(vector_store, [KVObject("d", chunk, "raw", 100)])
    assert library.vector_stores.get(vector_store, "").size.kv_bytes == 100
    library.attached.detach(vector_store, "", file_id)
    left = library.vector_stores.get(vector_store, "")
    assert (left.passage_bytes, left.size.kv_bytes) == (0, 0)


def test_using_a_vector_store_puts_off_its_end_and_is_written_at_most_once_a_minute(library, catalogue, store):
    vector_store, now = store(expires_after_days=1), int(time.time())
    for age_s, is_touched in ((30, False), (61, True), (86_300, True)):
        set_time(catalogue, vector_store, now - age_s)
        library.vector_stores.use(vector_store, "")
        active = library.vector_stores.get(vector_store, "").last_active_at
        assert (active >= now) == is_touched
        assert is_touched or active == now - age_s


def test_using_a_vector_store_never_waits_for_a_writer(library, catalogue, store):
    vector_store = store()
    set_time(catalogue, vector_store, 1000)
    with catalogue.database.write():
        began = time.monotonic()
        library.vector_stores.use(vector_store, "")
        assert time.monotonic() - began < 1
    assert library.vector_stores.get(vector_store, "").last_active_at == 1000
    library.vector_stores.use(vector_store, "")
    assert library.vector_stores.get(vector_store, "").last_active_at > 1000


def test_an_expired_vector_store_can_be_looked_at_and_deleted_but_not_used(library, catalogue, upload, store, ingested):
    file_id = upload()
    vector_store = store(file_id, expires_after_days=2)
    ingested(vector_store, file_id, "some text")
    set_time(catalogue, vector_store, int(time.time()) - 2 * 86_400)
    settings = VectorStoreSettings(expires_after_days=9)
    for use in (
        lambda: library.vector_stores.use(vector_store, ""),
        lambda: library.vector_stores.update(vector_store, "", settings),
        lambda: library.attached.attach(vector_store, "", Attachment(file_id)),
        lambda: library.attached.attach_batch(vector_store, "", [Attachment(file_id)]),
        lambda: catalogue.use_collection(vector_store, ""),
    ):
        with pytest.raises(InvalidValue, match="has expired; make a new one"):
            use()
    assert library.vector_stores.get(vector_store, "").is_expired(time.time())
    library.sweep()
    emptied = library.vector_stores.get(vector_store, "")
    assert (emptied.size.num_chunks, emptied.file_counts.total) == (0, 0)
    assert library.files.get(file_id, "").id == file_id
    library.vector_stores.delete(vector_store, "")


def test_a_sweep_leaves_vector_stores_alone_that_have_not_expired(library, catalogue, upload, store, ingested):
    file_id = upload()
    stores = store(file_id, expires_after_days=2), store(file_id)
    for each, age_s in zip(stores, (2 * 86_400 - 60, 10**9), strict=True):
        ingested(each, file_id, "some text")
        set_time(catalogue, each, int(time.time()) - age_s)
    library.sweep()
    assert [library.vector_stores.get(s, "").size.num_chunks for s in stores] == [1, 1]


# attached files


def test_attaching_a_file_again_changes_nothing_unless_it_is_attached_differently(library, upload, store, ingested):
    file_id = upload()
    vector_store = store(file_id)
    ingested(vector_store, file_id, "text")
    done = library.attached.get(vector_store, "", file_id)
    assert library.attached.attach(vector_store, "", Attachment(file_id)) == done
    again = library.attached.attach(vector_store, "", Attachment(file_id, {"a": 1.0}, 200, 50))
    assert (again.status, again.attributes, again.chunk_tokens) == ("in_progress", {"a": 1.0}, 200)
    ingested(vector_store, file_id, "text")
    kept = library.attached.attach(vector_store, "", Attachment(file_id))
    assert (kept.status, kept.attributes, kept.chunk_overlap_tokens) == ("completed", {"a": 1.0}, 50)
    assert library.vector_stores.get(vector_store, "").file_counts.total == 1


@pytest.mark.parametrize("name", ["a.exe", "README", ".txt.zip"])
def test_a_file_of_an_unknown_format_fails_when_it_is_attached_and_says_which_formats_there_are(
    library, upload, store, name
):
    file_id = upload(name)
    file = library.attached.attach(store(), "", Attachment(file_id))
    assert (file.status, file.error_code) == ("failed", "unsupported_file")
    assert file.error_message.startswith(f"{name}: ") and ".pdf" in file.error_message


def test_a_file_that_failed_is_tried_again_when_it_is_attached_again(library, catalogue, upload, store):
    file_id = upload()
    vector_store = store(file_id)
    with catalogue.database.write() as connection:
        connection.execute("UPDATE collection_files SET status = 'failed', error_code = 'invalid_file'")
    again = library.attached.attach(vector_store, "", Attachment(file_id))
    assert (again.status, again.error_code) == ("in_progress", None)


def test_new_attributes_take_the_place_of_the_old_ones_in_the_documents_metadata(library, catalogue, upload, store):

    file_id = upload()
    vector_store = store(file_id)
    library.attached.attach(vector_store, "", Attachment(file_id, {"year": 1999.0, "draft": True}))
    metadata = {"author": "Ada", "year": 1999.0, "draft": True}
    for suffix in ("", "-" + "a" * 16):
        document = Document(file_id + suffix, "", (), "a.txt", metadata)
        catalogue.replace_document(vector_store, document, [], catalogue.vectors(vector_store)[1])
    before = catalogue.collection(vector_store).revision
    library.attached.update(vector_store, "", file_id, {"year": 2024.0})
    assert [dict(d.metadata) for d in catalogue.documents(vector_store)] == [{"author": "Ada", "year": 2024.0}] * 2
    assert library.attached.get(vector_store, "", file_id).attributes == {"year": 2024.0}
    assert catalogue.collection(vector_store).revision > before


def test_a_cancelled_batch_keeps_what_is_done_and_drops_what_is_half_done(
    library, catalogue, upload, store, ingested, add
):
    done, half, untouched, unreadable = upload(), upload(), upload(), upload("a.exe")
    vector_store = store()
    files = [Attachment(f) for f in (done, half, untouched, unreadable)]
    batch = library.attached.attach_batch(vector_store, "", files)
    assert (batch.status, batch.file_counts.in_progress, batch.file_counts.failed) == ("in_progress", 3, 1)
    ingested(vector_store, done, "done")
    add(half, "half", collection=vector_store)
    cancelled = library.attached.cancel_batch(vector_store, "", batch.id)
    counts = cancelled.file_counts
    assert (cancelled.status, counts.completed, counts.cancelled, counts.failed) == ("cancelled", 1, 2, 1)
    assert [d.document_id for d in catalogue.documents(vector_store)] == [done]
    assert library.attached.batch(vector_store, "", batch.id) == cancelled


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (("completed", "failed"), "completed"),
        (("failed", "failed"), "failed"),
        (("completed", "in_progress"), "in_progress"),
        (("completed", "cancelled"), "cancelled"),
    ],
)
def test_the_status_of_a_batch_sums_up_its_files(library, catalogue, upload, store, states, status):
    vector_store, files = store(), [upload() for _ in states]
    batch = library.attached.attach_batch(vector_store, "", [Attachment(f) for f in files])
    with catalogue.database.write() as connection:
        for file_id, state in zip(files, states, strict=True):
            connection.execute("UPDATE collection_files SET status = ? WHERE file_id = ?", (state, file_id))
    assert library.attached.batch(vector_store, "", batch.id).status == status


def test_the_passages_of_a_file_come_in_order_and_no_others(library, upload, store, ingested):
    first, second = upload(), upload()
    vector_store = store(first, second)
    ingested(vector_store, second, "other")
    ingested(vector_store, first, "one", "two", document_id=first + "-" + "b" * 16)
    ingested(vector_store, first, "three", document_id=first + "-" + "a" * 16)
    assert library.attached.texts(vector_store, "", first) == ["one", "two", "three"]


# owners


def test_what_is_somebody_elses_is_as_unknown_as_what_does_not_exist(library, upload, store):
    """Every method, every id: alice's things asked for by bob give the very error that ids of nothing give."""
    file_id = upload(owner="alice")
    vector_store = store(file_id, owner="alice")
    batch = library.attached.attach_batch(vector_store, "alice", [Attachment(file_id)]).id
    bobs_file, bobs_store = upload(owner="bob"), store(owner="bob")
    attached, stores, files = library.attached, library.vector_stores, library.files
    attacks = {
        "file": [
            lambda f: files.get(f, "bob"),
            lambda f: files.open(f, "bob"),
            lambda f: files.delete(f, "bob"),
            lambda f: store(f, owner="bob"),
            lambda f: attached.attach(bobs_store, "bob", Attachment(f)),
            lambda f: attached.attach_batch(bobs_store, "bob", [Attachment(bobs_file), Attachment(f)]),
            lambda f: attached.get(bobs_store, "bob", f),
            lambda f: attached.update(bobs_store, "bob", f, {}),
            lambda f: attached.detach(bobs_store, "bob", f),
            lambda f: attached.texts(bobs_store, "bob", f),
        ],
        "store": [
            lambda s: stores.get(s, "bob"),
            lambda s: stores.update(s, "bob", VectorStoreSettings("mine")),
            lambda s: stores.delete(s, "bob"),
            lambda s: stores.use(s, "bob"),
            lambda s: attached.attach(s, "bob", Attachment(bobs_file)),
            lambda s: attached.attach_batch(s, "bob", [Attachment(bobs_file)]),
            lambda s: attached.get(s, "bob", file_id),
            lambda s: attached.page(s, "bob", PageRequest()),
            lambda s: attached.update(s, "bob", file_id, {}),
            lambda s: attached.detach(s, "bob", file_id),
            lambda s: attached.texts(s, "bob", file_id),
            lambda s: attached.batch(s, "bob", batch),
            lambda s: attached.cancel_batch(s, "bob", batch),
            lambda s: attached.page(s, "bob", PageRequest(), batch_id=batch),
        ],
        "batch": [
            lambda b: attached.batch(bobs_store, "bob", b),
            lambda b: attached.cancel_batch(bobs_store, "bob", b),
            lambda b: attached.page(bobs_store, "bob", PageRequest(), batch_id=b),
        ],
    }
    ids = {
        "file": (file_id, NOBODYS_FILE),
        "store": (vector_store, NOBODYS_STORE),
        "batch": (batch, NOBODYS_BATCH),
    }
    for kind, calls in attacks.items():
        theirs, nobodys = ids[kind]
        for call in calls:
            with pytest.raises(NotFound) as hidden:
                call(theirs)
            with pytest.raises(NotFound) as missing:
                call(nobodys)
            assert str(hidden.value) == str(missing.value).replace(nobodys, theirs)
    assert files.get(file_id, "alice").id == file_id
    assert stores.get(vector_store, "alice").file_counts.in_progress == 1
    assert [f.id for f in files.page("bob", PageRequest()).items] == [bobs_file]
    assert [s.id for s in stores.page("bob", PageRequest()).items] == [bobs_store]


def test_somebody_elses_id_as_cursor_tells_nothing(library, upload, store):
    """A cursor is a place in time: what is somebody else's and what does not exist give the same page."""
    mine, theirs = upload(owner="bob"), upload(owner="alice")
    nothing = theirs[:-1] + ("0" if theirs[-1] != "0" else "1")
    for cursor in (theirs, nothing):
        assert [f.id for f in library.files.page("bob", PageRequest(after=cursor)).items] == [mine]
    mine, theirs = store(owner="bob"), store(owner="alice")
    nothing = theirs[:-1] + ("0" if theirs[-1] != "0" else "1")
    for cursor in (theirs, nothing):
        assert [s.id for s in library.vector_stores.page("bob", PageRequest(after=cursor)).items] == [mine]


# pages


def test_ids_sort_by_the_time_of_their_making_and_tell_it():
    ids = []
    for _ in range(200):
        ids.append(new_id("x-"))
        time.sleep(2e-6)
    assert ids == sorted(ids) and len(set(ids)) == 200
    assert all(len(id) == 26 and abs(made_at(id) - time.time()) < 60 for id in ids)


@given(
    num_items=st.integers(0, 12),
    limit=st.integers(1, 5),
    order=st.sampled_from(["asc", "desc"]),
    removed=st.sets(st.integers(0, 11)),
    backwards=st.booleans(),
)
def test_pages_put_together_are_the_list_whatever_is_deleted_between_them(num_items, limit, order, removed, backwards):
    """Read page by page, each item that has been read already may be deleted before the next page is asked for."""
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (a INTEGER, b TEXT)")
    rows = [(i // 3, f"{i:02}") for i in range(num_items)]
    connection.executemany("INSERT INTO t VALUES (?, ?)", rows)
    places = {b: (a, b) for a, b in rows}
    listed = rows if order == "asc" else rows[::-1]
    request = PageRequest(limit, order, before="99" if backwards else None)
    places["99"] = (99, "99") if order == "asc" else (-1, "")
    read, has_more = [], True
    while has_more:
        page, has_more = read_page(connection, "SELECT a, b FROM t WHERE 1", (), ("a", "b"), request, places.get)
        assert len(page) == limit or not has_more
        if not page:
            break
        for _, b in page:
            if int(b) in removed:
                connection.execute("DELETE FROM t WHERE b = ?", (b,))
        if backwards:
            read, request = page + read, replace(request, before=page[0][1])
        else:
            read, request = read + page, replace(request, after=page[-1][1])
    assert read == listed
    connection.close()


def test_a_list_can_be_cut_on_both_sides_and_a_cursor_must_be_an_id(library, upload, store):
    files = [upload() for _ in range(5)]
    between = PageRequest(order="asc", after=files[0], before=files[3])
    assert [f.id for f in library.files.page("", between).items] == files[1:3]
    for page in (library.files.page, library.vector_stores.page):
        with pytest.raises(InvalidValue, match="after"):
            page("", PageRequest(after="nonsense"))
    stores = [store() for _ in range(3)]
    newest = library.vector_stores.page("", PageRequest(limit=2))
    assert ([s.id for s in newest.items], newest.has_more) == ([stores[2], stores[1]], True)
    library.vector_stores.delete(stores[1], "")
    assert [s.id for s in library.vector_stores.page("", PageRequest(after=stores[1])).items] == [stores[0], "c"]


def test_the_file_of_a_document_is_written_in_its_id():
    file_id = "file-" + "0123456789ab" * 2
    assert file_of(file_id) == file_of(file_id + "-" + "f" * 16) == file_id
    for other in ("0" * 32, "file-1", file_id + "-x", "x" + file_id, file_id + "\n"):
        assert file_of(other) is None
