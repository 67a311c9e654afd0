"""Nearest vectors by FAISS: exact inner product by default, any FAISS factory string instead.

Knows nothing about chunks: a vector is known by its int64 row id in the catalogue. `faiss` is imported when an index is
made, not before.

Invariant: the index holds exactly the vectors of one revision of a collection, or is brought there before it is used.
It is never the truth: whatever is wrong with the file, it is rebuilt from the catalogue.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import tempfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from index.catalogue import Catalogue
from index.config import VectorIndexConfig
from index.data_dir import DataDir
from index.errors import InvalidValue
from index.types import Collection, FloatArray, IntArray

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_CRC_BYTES = 4
_BLOCK_BYTES = 1 << 22
_MIN_PROBES, _PROBE_SHARE = 8, 16  # IVF lists visited: this many, or this fraction of them, whichever is more
_MAX_DRIFT = 0.25  # share of changed vectors beyond which an index is built anew instead of being brought up to date


@dataclass(frozen=True)
class IndexStamp:
    """What a saved index must match to be used: the first line of its file, as JSON."""

    collection_id: int
    revision: int
    dim: int
    faiss_factory: str
    format: int = _FORMAT


class VectorIndex:
    """Unit vectors by row id. `search` may run in several threads, `add` and `remove` only while nothing else does."""

    def __init__(self, index: Any, is_fallback: bool = False) -> None:
        """Wraps a FAISS index with an id map; use `build` or `open_index`."""
        self._index = index
        self.is_fallback = is_fallback  # exact search instead of the factory asked for: too few vectors to train it

    @classmethod
    def build(cls, row_ids: IntArray, vectors: FloatArray, config: VectorIndexConfig) -> VectorIndex:
        """An index of vectors float32 [n, dim] under row ids int64 [n].

        Raises InvalidValue where FAISS does not know the factory string. Falls back to exact search, with a warning in
        the log, where there are too few vectors to train the index.
        """
        faiss = importlib.import_module("faiss")
        dim = vectors.shape[1]
        try:
            inner = faiss.index_factory(dim, config.faiss_factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise InvalidValue(
                "faiss_factory", f"FAISS makes no index of dimension {dim} from {config.faiss_factory!r}"
            ) from error
        is_fallback = False
        if not inner.is_trained:
            try:
                inner.train(vectors)
                _set_probes(faiss, inner)
            except RuntimeError as error:  # fewer vectors than clusters
                _LOG.warning(
                    "%d vectors are too few to train the index %r, exact search is used: %s",
                    len(vectors),
                    config.faiss_factory,
                    str(error).strip().splitlines()[-1],
                )
                inner, is_fallback = faiss.IndexFlatIP(dim), True
        index = cls(faiss.IndexIDMap2(inner), is_fallback)
        index.add(row_ids, vectors)
        return index

    @property
    def num_vectors(self) -> int:
        return int(self._index.ntotal)

    @property
    def row_ids(self) -> IntArray:
        """int64 [n]: the row ids held, in no particular order."""
        ids: IntArray = importlib.import_module("faiss").vector_to_array(self._index.id_map)
        return ids

    def add(self, row_ids: IntArray, vectors: FloatArray) -> None:
        """Adds vectors float32 [n, dim] under new row ids int64 [n]."""
        if len(row_ids):
            self._index.add_with_ids(np.ascontiguousarray(vectors), row_ids)

    def remove(self, row_ids: IntArray) -> None:
        """Removes row ids int64 [n]. Raises RuntimeError for the kinds of index (HNSW) that cannot forget."""
        if len(row_ids):
            self._index.remove_ids(row_ids)

    def search(self, vectors: FloatArray, top_k: int, allowed: IntArray | None = None) -> tuple[FloatArray, IntArray]:
        """The nearest vectors of each of m: scores float32 [m, k], falling, and row ids int64 [m, k].

        k = min(top_k, num_vectors). An approximate index may find fewer: its last row ids are then -1. allowed: row ids
        int64 [n], the only ones to be found; an approximate index may find few of them, or none.
        """
        k = min(top_k, self.num_vectors if allowed is None else len(allowed))
        if k == 0:
            return np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64)
        parameters = None if allowed is None else self._parameters(allowed)
        try:
            scores, row_ids = self._index.search(np.ascontiguousarray(vectors, np.float32), k, params=parameters)
        except RuntimeError:
            if allowed is None:
                raise
            return self.search(vectors, 0)  # a kind of index (PQ) that cannot leave vectors out
        return scores, row_ids

    def _parameters(self, allowed: IntArray) -> Any:
        faiss = importlib.import_module("faiss")
        selector = faiss.IDSelectorBatch(allowed)
        ivf = faiss.try_extract_index_ivf(self._index)
        if ivf is not None:  # all lists: the few allowed vectors may lie in any
            return faiss.SearchParametersIVF(sel=selector, nprobe=ivf.nlist)
        return faiss.SearchParameters(sel=selector)

    def save(self, path: Path, stamp: IndexStamp) -> None:
        """Writes stamp, index and checksum under a temporary name, then renames. Raises OSError."""
        faiss = importlib.import_module("faiss")
        crc = 0
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:

                def write(block: bytes) -> None:
                    nonlocal crc
                    crc = zlib.crc32(block, crc)
                    file.write(block)

                write(json.dumps(asdict(stamp)).encode() + b"\n")
                faiss.write_index(self._index, faiss.PyCallbackIOWriter(write))
                file.write(crc.to_bytes(_CRC_BYTES, "little"))
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    @classmethod
    def load(cls, path: Path) -> tuple[VectorIndex, IndexStamp]:
        """The index saved at `path` and its stamp. Raises OSError, or ValueError where the file is not intact."""
        faiss = importlib.import_module("faiss")
        with path.open("rb") as file:
            _check_crc(file)  # before FAISS sees the bytes: it trusts the sizes it reads
            stamp = IndexStamp(**json.loads(file.readline()))
            return cls(faiss.read_index(faiss.PyCallbackIOReader(file.read))), stamp


def open_index(catalogue: Catalogue, collection: str, data_dir: DataDir, config: VectorIndexConfig) -> VectorIndex:
    """The index of a collection at its present revision (or a later one, if it changes meanwhile).

    Loads the saved index where its stamp matches; brings it up to date where only the revision differs; else, and where
    the file is missing or damaged, builds it from the catalogue's vectors. Saves what it has built, if it can.
    """
    current = catalogue.collection(collection)  # before the vectors are read: then the stamp is never too new
    stamp = stamp_of(current, config)
    path = data_dir.index_file(collection)
    index, saved = _load_or_none(path)
    if index is not None and saved == stamp:
        return index
    fits = index is not None and saved is not None and _differs_in_revision_only(saved, stamp)
    if index is None or not fits or not update_index(index, catalogue, collection):
        index = VectorIndex.build(*catalogue.vectors(collection), config)
    try:
        if not index.is_fallback:
            index.save(path, stamp)
    except OSError as error:
        _LOG.warning("the vector index %s is not saved (%s); it will be built anew next time", path, error)
    return index


def update_index(index: VectorIndex, catalogue: Catalogue, collection: str) -> bool:
    """Adds and removes what has changed since the index was made; False if that is no use and it must be rebuilt."""
    there, held = catalogue.row_ids(collection), index.row_ids
    added, removed = np.setdiff1d(there, held), np.setdiff1d(held, there)
    if index.is_fallback or len(added) + len(removed) > _MAX_DRIFT * max(len(held), 1):
        return False
    try:
        index.remove(removed)
    except RuntimeError:
        return False
    index.add(*catalogue.vectors(collection, added.tolist()))
    return True


def stamp_of(collection: Collection, config: VectorIndexConfig) -> IndexStamp:
    """The stamp of an index of this collection at its revision."""
    return IndexStamp(collection.collection_id, collection.revision, collection.dim, config.faiss_factory)


def _differs_in_revision_only(a: IndexStamp, b: IndexStamp) -> bool:
    return (a.collection_id, a.dim, a.faiss_factory, a.format) == (b.collection_id, b.dim, b.faiss_factory, b.format)


def _load_or_none(path: Path) -> tuple[VectorIndex | None, IndexStamp | None]:
    try:
        return VectorIndex.load(path)
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        _LOG.warning("the vector index %s cannot be read (%s); it is built anew from the catalogue", path, error)
        return None, None


def _check_crc(file: BinaryIO) -> None:
    size = os.fstat(file.fileno()).st_size - _CRC_BYTES
    crc, left = 0, size
    while left > 0:
        block = file.read(min(_BLOCK_BYTES, left))
        crc, left = zlib.crc32(block, crc), left - len(block)
    if size < 0 or crc != int.from_bytes(file.read(_CRC_BYTES), "little"):
        raise ValueError("checksum does not match")
    file.seek(0)


def _set_probes(faiss: Any, index: Any) -> None:
    """FAISS visits one IVF list unless told otherwise, which misses most neighbours."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = min(ivf.nlist, max(_MIN_PROBES, ivf.nlist // _PROBE_SHARE))
