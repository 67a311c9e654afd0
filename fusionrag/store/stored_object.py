"""One stored object in memory and as bytes: a safetensors file whose metadata holds the spec and a checksum.

    8 bytes        length of the header, little-endian
    header         canonical JSON, padded with spaces to 8 bytes: {"__metadata__": {format, spec, checksum}, tensors}
    payload        the tensors of `codec.layout`, in that order, without gaps

Any safetensors reader opens it. Knows nothing of paths or of durability. Invariant: of a file's header only the shape
and the checksum are read; from these two and the spec that was asked for, the header is built anew and must be equal
byte for byte. So nothing else in a file has to be trusted, and a change anywhere in it is noticed.

The checksum is the CRC-32 of the header (with a checksum of zeros) and the payload. Its purpose is to notice failing
disks and cut files, not attackers, who could write a checksum of their own: CRC-32 notices every error burst of up to
32 bits and all but 2^-32 of other damage, in a quarter of the time of BLAKE2b (measured: 4.1 against 0.9 GB/s), which
would make the check several times as slow as the read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import BinaryIO

import torch

from fusionrag.errors import StoreError
from fusionrag.store.base import BadObject
from fusionrag.store.codec import EncodedKV, KVShape, TensorLayout, dtype_named, encode, layout, shape_of
from fusionrag.types import ChunkKV, KVSpec

FORMAT = "fusionrag-kv/1"

_NO_CHECKSUM = "0" * 8
MAX_HEADER_BYTES = 16 << 20  # far above the token ids of any chunk and prefix
_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class StoredObject:
    """A spec and its encoded tensors (CPU, contiguous, as `codec.layout` names them)."""

    spec: KVSpec
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def encoded(cls, spec: KVSpec, kv: ChunkKV) -> StoredObject:
        """Shares no memory with `kv`. Raises StoreError if `kv` is not what `spec` says, or the codec refuses it."""
        dtype, shape = dtype_named(spec.dtype), KVShape.of(kv)
        if kv.keys.dtype != dtype:
            raise StoreError(f"dtype: the spec says {spec.dtype}, the KV is {kv.keys.dtype}")
        if shape.num_tokens != len(spec.chunk_ids):
            raise StoreError(f"chunk_ids: the spec has {len(spec.chunk_ids)} tokens, the KV {shape.num_tokens}")
        return cls(spec, encode(kv, spec.codec))

    @classmethod
    def parsed(cls, data: torch.Tensor, spec: KVSpec, verify_checksum: bool) -> StoredObject:
        """The object in `data`, uint8 (n,), whose tensors are views of it. Raises BadObject saying what is wrong."""
        header_end = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
        if not 8 < header_end <= len(data):
            raise BadObject(f"cut or overwritten: {len(data)} bytes do not hold a header that ends at {header_end}")
        header, spec_text = data[:header_end].numpy().tobytes(), _canonical(spec)
        shape, checksum = _claims(header[8:], spec_text, spec.codec, len(spec.chunk_ids))
        try:
            tensors = layout(spec.codec, dtype_named(spec.dtype), shape)
        except StoreError as error:
            raise BadObject(str(error)) from error
        if header != _header(spec_text, tensors, checksum):
            raise BadObject("the header is damaged")
        if len(data) != header_end + (num_bytes := _payload_bytes(tensors)):
            raise BadObject(f"{len(data)} bytes where {header_end + num_bytes} were written")
        if verify_checksum and checksum != _checksum(spec_text, tensors, [data[header_end:].numpy().data]):
            raise BadObject("the checksum does not match")
        return cls(spec, _views(data[header_end:], tensors))

    @property
    def payload(self) -> EncodedKV:
        """What a request needs of it."""
        return EncodedKV(self.spec.codec, dtype_named(self.spec.dtype), self.tensors)

    def serialized(self) -> list[memoryview]:
        """The bytes of the file, in pieces that are views of the tensors."""
        shape = shape_of(self.spec.codec, self.tensors["kv"].shape)
        tensors = layout(self.spec.codec, dtype_named(self.spec.dtype), shape)
        payload = [self.tensors[t.name].reshape(-1).view(torch.uint8).numpy().data for t in tensors]
        spec_text = _canonical(self.spec)
        return [memoryview(_header(spec_text, tensors, _checksum(spec_text, tensors, payload))), *payload]


def spec_fields(file: BinaryIO) -> dict[str, object]:
    """The fields of the spec that a file was written for, from its header alone. Raises BadObject."""
    try:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise BadObject("the header is not readable")
        found = json.loads(json.loads(file.read(size))["__metadata__"]["spec"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadObject("the header is not readable") from error
    if not isinstance(found, dict):
        raise BadObject("the header is not readable")
    return found


def _claims(header: bytes, spec_text: str, codec: str, chunk_tokens: int) -> tuple[KVShape, str]:
    """The two things only the file knows: the sizes and the checksum. Raises BadObject where they make no sense."""
    try:
        fields = json.loads(header)
        metadata = fields["__metadata__"]
        written_as, written_for, checksum = metadata["format"], metadata["spec"], metadata["checksum"]
        kv_shape = fields["kv"]["shape"]
        shape = shape_of(codec, kv_shape)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadObject("the header is not readable") from error
    if written_as != FORMAT:
        raise BadObject(f"unknown format {written_as!r}, this version reads {FORMAT!r}")
    if written_for != spec_text:
        raise BadObject("it was written for another spec")
    if not all(type(n) is int and n > 0 for n in kv_shape) or shape.num_tokens != chunk_tokens:
        raise BadObject(f"shape (L, 2, G, T, D) = {kv_shape} does not fit a chunk of {chunk_tokens} tokens")
    return shape, checksum


def _canonical(spec: KVSpec) -> str:
    """The text whose SHA-256 is `spec.digest`."""
    return json.dumps({f.name: getattr(spec, f.name) for f in fields(spec)}, sort_keys=True)  # asdict copies all ids


def _header(spec_text: str, tensors: tuple[TensorLayout, ...], checksum: str) -> bytes:
    """Length and header; 8 divides the number of bytes, so that tensors behind it are aligned."""
    fields: dict[str, object] = {
        "__metadata__": {"checksum": checksum, "format": FORMAT, "spec": spec_text},
    }
    start = 0
    for t in tensors:
        stop = start + prod(t.shape) * t.dtype.itemsize
        fields[t.name] = {"dtype": _SAFETENSORS_DTYPES[t.dtype], "shape": t.shape, "data_offsets": (start, stop)}
        start = stop
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checksum(spec_text: str, tensors: tuple[TensorLayout, ...], payload: list[memoryview]) -> str:
    crc = zlib.crc32(_header(spec_text, tensors, _NO_CHECKSUM))
    for part in payload:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def _payload_bytes(tensors: tuple[TensorLayout, ...]) -> int:
    return sum(prod(t.shape) * t.dtype.itemsize for t in tensors)


def _views(payload: torch.Tensor, tensors: tuple[TensorLayout, ...]) -> dict[str, torch.Tensor]:
    views, start = {}, 0
    for t in tensors:
        stop = start + prod(t.shape) * t.dtype.itemsize
        views[t.name] = payload[start:stop].view(t.dtype).reshape(t.shape)
        start = stop
    return views
