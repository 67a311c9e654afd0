"""The books on KV: what goes out of date, what becomes garbage, what comes back."""

import pytest

from index import CollectionNotFound, KVObject, Vanished


@pytest.fixture
def chunk_ids(add) -> list[str]:
    """Four documents of one chunk each."""
    return [add(name, f"text of {name}")[0] for name in "abcd"]


def raw(chunk_id: str, digest: str = "", num_bytes: int = 10) -> KVObject:
    return KVObject(digest or f"raw-{chunk_id}", chunk_id, "raw", num_bytes)


def fused(chunk_id: str, *related: str, digest: str = "") -> KVObject:
    return KVObject(digest or f"fused-{chunk_id}", chunk_id, "fused", 20, related)


def test_related_chunks_keep_their_order_and_are_replaced_whole(catalogue, chunk_ids):
    a, b, c, d = chunk_ids
    catalogue.set_related("c", {a: [c, b, d], b: [a]})
    catalogue.set_related("c", {b: [d, c]})
    assert catalogue.related("c", [a, b, c]) == {a: (c, b, d), b: (d, c)}


def test_related_chunks_that_are_not_in_the_collection_are_not_taken_in(catalogue, chunk_ids):
    a, b, *_ = chunk_ids
    catalogue.set_related("c", {a: ["gone"], "gone": [a], b: [a]})
    assert catalogue.related("c", [a, b, "gone"]) == {b: (a,)}


def test_objects_are_listed_as_they_were_booked(catalogue, chunk_ids):
    a, b, c, d = chunk_ids
    objects = [raw(a), fused(a, c, b), raw(b)]
    catalogue.record_kv("c", objects)
    catalogue.record_kv("c", objects)
    key = lambda o: (o.chunk_id, o.kind)  # noqa: E731
    assert catalogue.kv_objects("c") == sorted(objects, key=key)
    assert catalogue.kv_objects("c", [b, d]) == [raw(b)]
    counts = catalogue.counts("c")
    assert (counts.num_raw, counts.num_fused, counts.num_stale, counts.kv_bytes) == (2, 1, 0, 40)


@pytest.mark.parametrize("change", ["delete", "replace"])
def test_a_chunk_that_leaves_takes_its_kv_along_and_makes_stale_what_saw_it(catalogue, add, chunk_ids, change):
    a, b, c, d = chunk_ids
    catalogue.set_related("c", {a: [b, c], b: [a], c: [a, d]})
    catalogue.record_kv("c", [raw(b), fused(b, a), fused(a, b, c), fused(c, a, d), raw(a)])
    if change == "delete":
        vanished = catalogue.delete_document("c", "b")
        assert vanished == Vanished((b,), (f"fused-{b}", f"raw-{b}"))
    else:
        add("b", "another text")
    assert {o.digest: o.is_stale for o in catalogue.kv_objects("c")} == {
        f"fused-{a}": True,
        f"fused-{c}": False,
        f"raw-{a}": False,
    }
    assert catalogue.related("c", chunk_ids) == {c: (a, d)}
    assert catalogue.kv_garbage() == [f"fused-{b}", f"raw-{b}"]
    assert catalogue.counts("c").num_stale == 1


def test_a_replacement_that_keeps_a_chunk_keeps_its_kv(catalogue, add, chunk_ids):
    a, b, *_ = chunk_ids
    catalogue.record_kv("c", [raw(a), fused(b, a)])
    add("a", "text of a", "and more")
    assert catalogue.kv_objects("c") == sorted([raw(a), fused(b, a)], key=lambda o: o.chunk_id)
    assert catalogue.kv_garbage() == []


def test_garbage_waits_until_its_files_are_gone(catalogue, chunk_ids):
    catalogue.record_kv("c", [raw(chunk_ids[0])])
    digests = catalogue.delete_document("c", "a").kv_digests
    assert catalogue.kv_garbage() == list(digests)
    catalogue.forget_kv(digests)
    assert catalogue.kv_garbage() == []


def test_an_object_that_another_collection_has_is_not_garbage(catalogue, add, chunk_ids):
    catalogue.open_collection("other", "words-1", "hashing-1", 64)
    (a,) = add("a", "text of a", collection="other")
    assert a == chunk_ids[0]
    for name in ("c", "other"):
        catalogue.record_kv(name, [raw(a)])
    assert catalogue.delete_document("c", "a") == Vanished((a,), ())
    assert catalogue.kv_garbage() == []
    assert catalogue.delete_collection("other") == Vanished((a,), (f"raw-{a}",))
    assert catalogue.kv_garbage() == [f"raw-{a}"]


def test_garbage_that_is_computed_again_is_no_garbage(catalogue, add, chunk_ids):
    a, *_ = chunk_ids
    catalogue.record_kv("c", [raw(a)])
    catalogue.delete_document("c", "a")
    add("a", "text of a")
    catalogue.record_kv("c", [raw(a)])
    assert catalogue.kv_garbage() == []


def test_a_new_fused_object_supersedes_the_stale_one_but_no_fresh_one(catalogue, chunk_ids):
    a, b, c, d = chunk_ids
    catalogue.record_kv("c", [fused(a, b, digest="old"), fused(a, c, digest="other-dtype")])
    catalogue.delete_document("c", "b")
    catalogue.record_kv("c", [fused(a, d, digest="new")])
    assert {o.digest for o in catalogue.kv_objects("c")} == {"other-dtype", "new"}
    assert catalogue.kv_garbage() == ["old"]


def test_an_object_of_a_chunk_that_left_meanwhile_is_garbage_and_one_that_saw_it_stale(catalogue, chunk_ids):
    a, b, *_ = chunk_ids
    catalogue.delete_document("c", "b")
    catalogue.record_kv("c", [raw(b), fused(a, b)])
    assert catalogue.kv_garbage() == [f"raw-{b}"]
    assert [o.is_stale for o in catalogue.kv_objects("c")] == [True]


def test_kv_changes_raise_the_kv_revision_and_leave_the_other_alone(catalogue, chunk_ids):
    before = catalogue.collection("c")
    catalogue.record_kv("c", [raw(chunk_ids[0])])
    catalogue.set_related("c", {chunk_ids[0]: [chunk_ids[1]]})
    catalogue.forget_kv([f"raw-{chunk_ids[0]}"])
    after = catalogue.collection("c")
    assert (after.revision, after.kv_revision) == (before.revision, before.kv_revision + 3)
    assert catalogue.kv_objects("c") == []


def test_books_are_kept_for_known_collections_only(catalogue):
    with pytest.raises(CollectionNotFound):
        catalogue.record_kv("x", [raw("a")])
