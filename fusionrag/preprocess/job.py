"""The offline job: all chunks of a corpus that lack their KV, raw pass first, then fused pass. Resumable at any point.

What is done is decided by the store alone: an object that is there is never computed again, and an object is there only
when it is whole. So a job may be killed anywhere, started again, or run in several shards side by side.

Memory is bounded by the batch: its chunks' KV and their related chunks'. Knows nothing of files or progress bars.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fusionrag.arena import KVArena
from fusionrag.config import EngineConfig
from fusionrag.errors import PromptTooLong
from fusionrag.layout import Naming, compute_prefix
from fusionrag.model import LanguageModel
from fusionrag.preprocess.passes import ChunkJob, compute_chunks
from fusionrag.store.base import KVStore
from fusionrag.types import ChunkKV, KVSpec, PromptChunk
from index.types import KVObject

SLOTS_PER_ROW = 8


@dataclass(frozen=True)
class StoredChunk:
    """One object that is in the store now; `computed` is False when it had been there before."""

    spec: KVSpec
    chunk: PromptChunk
    num_bytes: int
    computed: bool

    @property
    def entry(self) -> KVObject:
        """As the catalogue books it."""
        spec = self.spec
        return KVObject(spec.digest, self.chunk.chunk_id, spec.kind, self.num_bytes, spec.related)


class PreprocessJob:
    """Computes raw and fused KV. `token_ids_of` must know every chunk that is anyone's related chunk."""

    def __init__(
        self,
        model: LanguageModel,
        store: KVStore,
        names: Naming,
        token_ids_of: Mapping[str, tuple[int, ...]],
        config: EngineConfig,
        prefix: ChunkKV | None = None,
        arena: KVArena | None = None,
    ) -> None:
        """prefix, arena: those of a running engine, to be shared; made here otherwise."""
        self._model, self._store, self._names = model, store, names
        self._token_ids_of = token_ids_of
        self._max_rows = config.max_batch_tokens
        self._prefix = prefix or compute_prefix(model, names.prefix_ids)
        # room for a batch of rows behind several times as much context, or one prompt of full length: no more is used
        num_slots = max(model.max_model_len, SLOTS_PER_ROW * config.max_batch_tokens)
        self._arena = arena or model.new_arena(min(config.num_slots(model.max_model_len), num_slots))

    def run(self, chunks: Sequence[PromptChunk]) -> Iterator[StoredChunk]:
        """One item per object, as soon as it is durable: first the raw KV of `raw_chunks`, then the fused KV of those
        that have related chunks. Raises PromptTooLong for a chunk that does not fit behind its related chunks."""
        raw = self.raw_chunks(chunks)
        yield from self._pass(raw, [self._names.spec(c.token_ids, "raw") for c in raw])
        fused = [(chunk, context) for chunk in chunks for context in chunk.contexts]
        specs = [self._names.spec(chunk.token_ids, "fused", context) for chunk, context in fused]
        yield from self._pass([chunk for chunk, _ in fused], specs)

    def raw_chunks(self, chunks: Sequence[PromptChunk]) -> list[PromptChunk]:
        """`chunks` and, behind them, their related chunks that are not among them: of other shards, or past a limit."""
        found = {chunk.chunk_id: chunk for chunk in chunks}
        for chunk in chunks:
            for other in chunk.related or ():
                found.setdefault(other, PromptChunk(other, self._token_ids_of[other]))
        return list(found.values())

    def _pass(self, chunks: Sequence[PromptChunk], specs: Sequence[KVSpec]) -> Iterator[StoredChunk]:
        missing = []
        for chunk, spec in zip(chunks, specs, strict=True):
            if self._store.contains(spec):
                bytes_per_token = self._model.shape.kv_bytes_per_token(self._model.dtype)
                yield StoredChunk(spec, chunk, bytes_per_token * len(chunk.token_ids), computed=False)
            else:
                missing.append((chunk, spec))
        for batch in self._batches(missing):
            jobs = [ChunkJob(chunk.token_ids, self._context(spec)) for chunk, spec in batch]
            computed = compute_chunks(self._model, self._arena, self._prefix, jobs)
            for (chunk, spec), kv in zip(batch, computed, strict=True):
                self._store.put(spec, kv)
                yield StoredChunk(spec, chunk, kv.num_bytes, computed=True)

    def _batches(self, missing: Sequence[tuple[PromptChunk, KVSpec]]) -> Iterator[list[tuple[PromptChunk, KVSpec]]]:
        """Runs of chunks whose rows fit a pass and whose spans fit the arena; at least one chunk each."""
        batch: list[tuple[PromptChunk, KVSpec]] = []
        rows = slots = 0
        for chunk, spec in missing:
            num_rows = len(chunk.token_ids)
            num_slots = self._num_slots(chunk, spec)
            full = rows + num_rows > self._max_rows or slots + num_slots > self._arena.num_slots
            if batch and full:
                yield batch
                batch, rows, slots = [], 0, 0
            batch.append((chunk, spec))
            rows, slots = rows + num_rows, slots + num_slots
        if batch:
            yield batch

    def _num_slots(self, chunk: PromptChunk, spec: KVSpec) -> int:
        context = sum(len(self._token_ids_of[r]) for r in spec.related)
        num_slots = self._prefix.num_tokens + context + len(chunk.token_ids)
        limit = min(self._model.max_model_len, self._arena.num_slots)
        if num_slots > limit:
            raise PromptTooLong(
                f"chunk {chunk.chunk_id} with {len(spec.related)} related chunks needs {num_slots} positions, "
                f"the model has {limit}; lower num_related or chunk_tokens",
                "num_related",
            )
        return num_slots

    def _context(self, spec: KVSpec) -> tuple[ChunkKV, ...]:
        return tuple(self._raw(chunk_id) for chunk_id in spec.related)

    def _raw(self, chunk_id: str) -> ChunkKV:
        """A related chunk's raw KV; computed here when it is missing (it has just been set aside as damaged)."""
        token_ids = self._token_ids_of[chunk_id]
        spec = self._names.spec(token_ids, "raw")
        hit = self._store.get(spec)
        if hit is not None:
            return hit.kv
        (kv,) = compute_chunks(self._model, self._arena, self._prefix, [ChunkJob(token_ids)])
        self._store.put(spec, kv)
        return kv
