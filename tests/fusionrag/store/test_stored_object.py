"""The bytes of one object: exact, readable by others, and every change noticed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrag.errors import StoreError
from fusionrag.store.base import BadObject
from fusionrag.store.codec import CODECS, DTYPES
from fusionrag.store.stored_object import FORMAT, StoredObject
from fusionrag.types import ChunkKV, KVSpec


def file_bytes(stored: StoredObject) -> bytearray:
    return bytearray(b"".join(stored.serialized()))


def parse(data: bytes | bytearray, spec: KVSpec, verify_checksum: bool = True) -> StoredObject:
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return StoredObject.parsed(buffer, spec, verify_checksum)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern of the dtype: NaNs with payload, infinities, subnormals, negative zero."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = shape[-1] * dtype.itemsize
    return torch.randint(0, 256, (*shape[:-1], num_bytes), dtype=torch.uint8, generator=generator).view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(sorted(DTYPES)),
    kind=st.sampled_from(["raw", "fused"]),
    prefix_ids=st.lists(st.integers(0, 2**31), max_size=9).map(tuple),
    fingerprint=st.text(max_size=9),
    seed=st.integers(0, 2**31),
)
def test_codec_none_keeps_every_bit(sizes, dtype, kind, prefix_ids, fingerprint, seed):
    spec = KVSpec(fingerprint, dtype, "none", prefix_ids, tuple(range(sizes[2])), kind)
    kv = ChunkKV(random_bits(sizes, DTYPES[dtype], seed), random_bits(sizes, DTYPES[dtype], seed + 1))
    restored = parse(file_bytes(StoredObject.encoded(spec, kv)), spec).payload.kv
    assert same_bits(restored.keys, kv.keys) and same_bits(restored.values, kv.values)


@pytest.mark.parametrize("codec", CODECS)
def test_any_safetensors_reader_opens_it_and_finds_spec_and_tensors(codec, make_spec, make_kv):
    spec = make_spec(codec=codec, dtype="bfloat16")
    stored = StoredObject.encoded(spec, make_kv(spec))
    data = bytes(file_bytes(stored))
    tensors = safetensors.torch.load(data)
    assert tensors.keys() == stored.tensors.keys()
    assert all(same_bits(tensors[name], stored.tensors[name]) for name in tensors)
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert metadata["format"] == FORMAT
    assert json.loads(metadata["spec"]) == json.loads(json.dumps(asdict(spec)))
    assert hashlib.sha256(metadata["spec"].encode()).hexdigest() == spec.digest


def test_a_layer_is_one_contiguous_run_of_the_file(make_spec, make_kv):
    spec = make_spec()
    kv = make_kv(spec)
    data = file_bytes(StoredObject.encoded(spec, kv))
    layer = torch.stack((kv.keys[1], kv.values[1])).numpy().tobytes()
    assert data.count(layer) == 1


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_in_any_byte_is_noticed(codec, make_spec, make_kv):
    spec = make_spec(codec=codec)
    data = file_bytes(StoredObject.encoded(spec, make_kv(spec, num_layers=1)))
    assert parse(data, spec).payload.kv.num_tokens == 3
    for place in range(len(data)):
        data[place] ^= 1 << (place % 8)
        with pytest.raises(BadObject):
            parse(data, spec)
        data[place] ^= 1 << (place % 8)


def test_every_length_but_the_whole_is_noticed(make_spec, make_kv):
    spec = make_spec()
    data = file_bytes(StoredObject.encoded(spec, make_kv(spec, num_layers=1)))
    for length in range(len(data)):
        with pytest.raises(BadObject):
            parse(data[:length], spec)
    with pytest.raises(BadObject, match="bytes where"):
        parse(data + b"\0", spec)


def test_without_the_checksum_length_and_header_are_still_checked(make_spec, make_kv):
    spec = make_spec()
    data = file_bytes(StoredObject.encoded(spec, make_kv(spec)))
    header_end = 8 + int.from_bytes(data[:8], "little")
    with pytest.raises(BadObject):
        parse(data[:-1], spec, verify_checksum=False)
    checksum_at = data.index(b'"checksum":"') + len(b'"checksum":"')
    for place in set(range(header_end)) - set(range(checksum_at, checksum_at + 8)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(BadObject):
            parse(damaged, spec, verify_checksum=False)


@pytest.mark.parametrize(
    ("metadata", "kv_shape", "reason"),
    [
        ({}, (1, 2, 1, 3, 4), "not readable"),
        ({"format": "fusionrag-kv/2"}, (1, 2, 1, 3, 4), "unknown format 'fusionrag-kv/2'"),
        ({"format": FORMAT, "spec": "{}"}, (1, 2, 1, 3, 4), "another spec"),
        ({"format": FORMAT}, (1, 2, 1, 4, 4), "does not fit a chunk of 3 tokens"),
        ({"format": FORMAT}, (1, 2, 3, 4), "not readable"),
        ({"format": FORMAT}, (1, 2, 0, 3, 4), "does not fit"),
        ({"format": FORMAT}, (1, 3, 1, 3, 4), "header is damaged"),
    ],
)
def test_a_sound_safetensors_file_that_is_not_this_object_is_refused_with_the_reason(
    metadata, kv_shape, reason, make_spec
):
    spec = make_spec()
    if metadata:
        metadata = {"spec": json.dumps(asdict(spec), sort_keys=True), "checksum": "0" * 8, **metadata}
    data = safetensors.torch.save({"kv": torch.zeros(kv_shape)}, metadata or None)
    with pytest.raises(BadObject, match=reason):
        parse(data, spec)


@pytest.mark.parametrize("header", [b"", b"[]", b"null", b"{", b"\xff" * 8, b"[" * 100_000, b'{"__metadata__":[]}'])
def test_a_header_that_is_no_header_is_refused(header, make_spec):
    with pytest.raises(BadObject):
        parse(len(header).to_bytes(8, "little") + header + bytes(64), make_spec())


def test_a_file_with_an_unknown_codec_is_refused(make_spec, make_kv):
    spec = make_spec(codec="zstd")
    metadata = {"spec": json.dumps(asdict(spec), sort_keys=True), "checksum": "0" * 8, "format": FORMAT}
    data = safetensors.torch.save({"kv": torch.zeros(1, 2, 1, 3, 4)}, metadata)
    with pytest.raises(BadObject, match="unknown codec 'zstd'"):
        parse(data, spec)
    with pytest.raises(StoreError, match="unknown codec 'zstd'"):
        StoredObject.encoded(spec, make_kv(spec))


def test_kv_that_the_spec_does_not_describe_is_refused(make_spec, make_kv):
    spec = make_spec()
    kv = make_kv(spec)
    with pytest.raises(StoreError, match=r"chunk_ids: the spec has 4 tokens, the KV 3"):
        StoredObject.encoded(make_spec(num_tokens=4), kv)
    with pytest.raises(StoreError, match=r"dtype: the spec says bfloat16"):
        StoredObject.encoded(replace(spec, dtype="bfloat16"), kv)
    with pytest.raises(StoreError, match=r"dtype: KV of dtype 'auto' cannot be stored"):
        StoredObject.encoded(replace(spec, dtype="auto"), kv)
