"""Files: found by exact spec only, private, set aside when bad."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import time
from dataclasses import fields, replace

import pytest

from fusionrag.errors import StoreError
from fusionrag.store import DiskStore
from fusionrag.store.disk import STALE_TEMPORARY_S
from fusionrag.types import KVSource, KVSpec

OTHER_VALUES = {
    "model_fingerprint": "another model",
    "dtype": "bfloat16",
    "codec": "int8",
    "prefix_ids": (1, 3),
    "chunk_ids": (100, 101, 103),
    "kind": "raw",
    "related": ("b" * 64, "a" * 64),  # the same chunks in another order
    "owner": "somebody",
    "format_version": 3,
}


def object_file(root, spec):
    return root / "objects" / spec.digest[:2] / f"{spec.digest}.safetensors"


@pytest.mark.parametrize("field", [f.name for f in fields(KVSpec)])
def test_a_spec_that_differs_in_any_field_misses(field, tmp_path, make_spec, make_kv):
    store, spec = DiskStore(tmp_path), make_spec()
    store.put(spec, make_kv(spec))
    other = replace(spec, **{field: OTHER_VALUES[field]})
    assert store.contains(spec) and not store.contains(other)
    assert store.get(other) is None
    assert store.get(spec) is not None


def test_a_hit_comes_from_disk_and_outlives_the_store_that_wrote_it(tmp_path, make_spec, make_kv):
    spec = make_spec()
    DiskStore(tmp_path).put(spec, make_kv(spec))
    hit = DiskStore(tmp_path).get(spec)
    assert hit.source is KVSource.DISK
    assert hit.kv.keys.equal(make_kv(spec).keys) and hit.kv.values.equal(make_kv(spec).values)


def test_what_was_read_may_be_written_to_without_changing_the_file(tmp_path, make_spec, make_kv):
    store, spec = DiskStore(tmp_path), make_spec()
    store.put(spec, make_kv(spec))
    store.get(spec).kv.keys.zero_()
    assert store.get(spec).kv.keys.equal(make_kv(spec).keys)


def test_files_and_folders_are_for_their_owner_alone(tmp_path, make_spec, make_kv):
    store, spec = DiskStore(tmp_path / "kv"), make_spec()
    store.put(spec, make_kv(spec))
    path = object_file(tmp_path / "kv", spec)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (path.parent, path.parent.parent, tmp_path / "kv" / "quarantine"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_second_put_writes_nothing(tmp_path, make_spec, make_kv):
    store, spec = DiskStore(tmp_path), make_spec()
    store.put(spec, make_kv(spec))
    written, inode = store.stats.bytes_written, object_file(tmp_path, spec).stat().st_ino
    store.put(spec, make_kv(spec))
    assert store.stats.bytes_written == written == object_file(tmp_path, spec).stat().st_size
    assert object_file(tmp_path, spec).stat().st_ino == inode


REGIONS = {
    "length": lambda _: 0,
    "tensors": lambda data: data.index(b"data_offsets"),
    "spec": lambda data: data.index(b"model_fingerprint"),
    "checksum": lambda data: data.index(b'"checksum":"') + 12,
    "padding": lambda data: 8 + int.from_bytes(data[:8], "little") - 1,
    "first value": lambda data: 8 + int.from_bytes(data[:8], "little"),
    "last value": lambda data: len(data) - 1,
}


@pytest.mark.parametrize("region", REGIONS)
def test_a_damaged_object_is_a_miss_set_aside_with_a_reason_and_can_be_written_again(
    region, tmp_path, make_spec, make_kv, caplog
):
    store, spec = DiskStore(tmp_path), make_spec()
    store.put(spec, make_kv(spec))
    path = object_file(tmp_path, spec)
    data = bytearray(path.read_bytes())
    data[REGIONS[region](data)] ^= 4
    path.write_bytes(data)

    with caplog.at_level(logging.WARNING, "fusionrag.store"):
        assert store.get(spec) is None
    assert spec.digest in caplog.text and "quarantine" in caplog.text
    assert not path.exists() and (tmp_path / "quarantine" / path.name).read_bytes() == bytes(data)
    assert (store.stats.quarantined, store.stats.misses, store.stats.hits_disk) == (1, 1, 0)
    assert list(store.digests()) == []

    store.put(spec, make_kv(spec))
    assert store.get(spec).kv.values.equal(make_kv(spec).values)


@pytest.mark.parametrize("length", [0, 7, 8, 9, 300, -100, -1])
def test_a_cut_object_is_set_aside(length, tmp_path, make_spec, make_kv):
    store, spec = DiskStore(tmp_path), make_spec()
    store.put(spec, make_kv(spec))
    path = object_file(tmp_path, spec)
    os.truncate(path, length % path.stat().st_size)
    assert store.get(spec) is None
    assert store.stats.quarantined == 1 and not path.exists()


def test_an_object_under_another_name_is_set_aside(tmp_path, make_spec, make_kv, caplog):
    store, spec, other = DiskStore(tmp_path), make_spec(), make_spec(kind="raw")
    store.put(spec, make_kv(spec))
    object_file(tmp_path, other).parent.mkdir(exist_ok=True)
    shutil.copy(object_file(tmp_path, spec), object_file(tmp_path, other))
    assert store.get(other) is None
    assert "written for another spec" in caplog.text
    assert store.get(spec) is not None


def test_verify_checksum_off_skips_the_payload_only(tmp_path, make_spec, make_kv):
    spec = make_spec()
    DiskStore(tmp_path).put(spec, make_kv(spec))
    path = object_file(tmp_path, spec)
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    trusting = DiskStore(tmp_path, verify_checksum=False)
    assert not trusting.get(spec).kv.values.equal(make_kv(spec).values)
    os.truncate(path, len(data) - 1)
    assert trusting.get(spec) is None


def test_an_object_that_cannot_be_opened_is_a_miss_but_stays(tmp_path, make_spec, caplog):
    store, spec = DiskStore(tmp_path), make_spec()
    path = object_file(tmp_path, spec)
    path.parent.mkdir()
    path.symlink_to(path)  # opening it fails with ELOOP, which says nothing about the object
    assert store.get(spec) is None
    assert "cannot be read" in caplog.text
    assert path.is_symlink() and store.stats.quarantined == 0 and store.stats.misses == 1


def test_delete_frees_the_object_and_its_quarantined_copy(tmp_path, make_spec, make_kv):
    store, spec = DiskStore(tmp_path), make_spec()
    store.put(spec, make_kv(spec))
    path = object_file(tmp_path, spec)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert store.get(spec) is None
    store.put(spec, make_kv(spec))
    assert store.delete(spec.digest) == size + size - 1
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("digest", ["", "../" * 10 + "etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_delete_takes_nothing_that_is_not_a_digest(digest, tmp_path):
    with pytest.raises(StoreError, match="digest"):
        DiskStore(tmp_path).delete(digest)


def test_only_stale_temporaries_are_swept_when_the_store_opens(tmp_path, make_spec, make_kv):
    store, spec = DiskStore(tmp_path), make_spec()
    store.put(spec, make_kv(spec))
    young, stale = (object_file(tmp_path, spec).parent / name for name in ("young.tmp", "stale.tmp"))
    for path, age_s in ((young, STALE_TEMPORARY_S / 2), (stale, STALE_TEMPORARY_S * 2)):
        path.write_bytes(b"half an object")
        os.utime(path, (time.time() - age_s,) * 2)
    reopened = DiskStore(tmp_path)
    assert young.exists() and not stale.exists()
    assert list(reopened.digests()) == [spec.digest]


def test_a_root_that_cannot_be_made_is_refused_with_its_path(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match=r"cannot open .*file/kv.*check the data directory"):
        DiskStore(tmp_path / "file" / "kv")
