"""Stored KV kept up with collections that change while they are served: one small pass at a time.

What a collection lacks is found from the catalogue: chunks that are new, and chunks that have lost a related chunk
(their fused KV is stale, and not used since the moment of the deletion). Related chunks are found for those, then their
raw and fused KV is computed, and files that nothing refers to any more are removed. Chunks that were there before keep
their related chunks when a nearer one is added: their KV stays right, if not the best there could be.

Invariant: nothing here is needed for an answer. A chunk without stored KV is computed in place; a chunk that leaves
while it is worked on leaves nothing behind, because the catalogue decides in one transaction what is booked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace

from fusionrag.config import PreprocessConfig
from fusionrag.engine import Engine
from fusionrag.errors import ArenaFull, PromptTooLong
from fusionrag.preprocess.job import PreprocessJob, StoredChunk
from fusionrag.preprocess.related import related_chunks
from fusionrag.sweep import sweep
from fusionrag.types import PromptChunk
from index import Catalogue, DataDir, open_index
from index.config import VectorIndexConfig
from index.errors import CollectionNotFound
from index.rare_words import RareWords
from index.types import Collection

log = logging.getLogger(__name__)
LOOK_EVERY_S = 1.0
WORDS_CHUNKS = 500  # whose words are counted in one piece of work
BATCH_CHUNKS = 64  # chunks whose token ids are in memory at a time


@dataclass
class _Seen:
    """What is known of one collection since this process began."""

    revision: int = -1  # at which nothing more was to do
    done: set[str] = field(default_factory=set)  # chunk ids whose KV is there, or cannot be computed


class Upkeep:
    """Background work for one engine. `step` belongs to the engine's thread."""

    def __init__(
        self,
        engine: Engine,
        catalogue: Catalogue,
        data_dir: DataDir,
        prefix_ids: tuple[int, ...],
        encoder_fingerprint: str,
        config: PreprocessConfig,
        index_config: VectorIndexConfig,
    ) -> None:
        self._engine, self._catalogue, self._data_dir = engine, catalogue, data_dir
        self._prefix_ids, self._encoder_fingerprint = prefix_ids, encoder_fingerprint
        self._config, self._index_config = config, index_config
        self._seen: dict[int, _Seen] = {}
        self._next_look = 0.0
        self._work: Iterator[None] | None = None

    @property
    def share(self) -> float:
        """The share of the engine's time that this may take while requests are running."""
        return self._engine.config.background_share

    def step(self) -> bool:
        """Does one bounded piece of work, at most one forward pass. False: there is nothing to do now."""
        if self._work is None:
            self._work = self._look()
        if self._work is None:
            return False
        try:
            next(self._work)
        except StopIteration:
            self._work = None
        except ArenaFull:
            self._work, self._next_look = None, time.monotonic() + LOOK_EVERY_S
            return False
        except CollectionNotFound:  # it was deleted while it was worked on
            self._work = None
        except BaseException:
            self._work, self._next_look = None, time.monotonic() + 60 * LOOK_EVERY_S
            raise
        return True

    def _look(self) -> Iterator[None] | None:
        """The work on the first collection that has changed, if it is time to look for one."""
        if time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + LOOK_EVERY_S
        sweep(self._catalogue, self._engine.store)
        for collection in self._catalogue.collections():
            seen = self._seen.setdefault(collection.collection_id, _Seen())
            if collection.encoder_fingerprint == self._encoder_fingerprint and seen.revision != collection.revision:
                return self._catch_up(collection, seen)
        return None

    def _catch_up(self, collection: Collection, seen: _Seen) -> Iterator[None]:
        """Brings one collection up to the state in which it was when this began; yields after every pass."""
        row_ids = self._catalogue.chunk_ids_by_row(collection.name)
        chunk_ids = list(dict.fromkeys(row_ids.values()))
        seen.done &= set(chunk_ids)
        without = self._catalogue.chunk_ids_without_related(collection.name)
        if self._config.num_related and without:
            words = yield from self._words(collection.name)
            seen.done -= self._find_related(collection, row_ids, without, words)
            yield
        waiting = [c for c in chunk_ids if c not in seen.done]
        for begin in range(0, len(waiting), BATCH_CHUNKS):
            yield from self._compute(collection, waiting[begin : begin + BATCH_CHUNKS], seen)
        seen.revision = collection.revision

    def _words(self, collection: str) -> Generator[None, None, RareWords]:
        """The rare words of all chunks; yields now and then."""
        words = RareWords()
        for i, stored in enumerate(self._catalogue.chunks(collection), start=1):
            words.add(stored.chunk.chunk_id, f"{stored.chunk.title} {stored.chunk.text}")
            if i % WORDS_CHUNKS == 0:
                yield
        return words

    def _find_related(
        self, collection: Collection, row_ids: dict[int, str], wanted: set[str], words: RareWords
    ) -> set[str]:
        """Sets the related chunks of `wanted`; returns those that have any."""
        rows = {chunk_id: row for row, chunk_id in row_ids.items() if chunk_id in wanted}
        found_rows, vectors = self._catalogue.vectors(collection.name, rows.values())
        index = open_index(self._catalogue, collection.name, self._data_dir, self._index_config)
        ids = [row_ids[row] for row in found_rows.tolist()]
        related = related_chunks(ids, vectors, index, row_ids, words, self._config)
        self._catalogue.set_related(collection.name, related)
        alone = [chunk_id for chunk_id, others in related.items() if not others]
        self._catalogue.drop_stale_kv(collection.name, alone)  # nothing will take its place
        return set(related).difference(alone)

    def _compute(self, collection: Collection, chunk_ids: list[str], seen: _Seen) -> Iterator[None]:
        related = self._catalogue.related(collection.name, chunk_ids)
        others = {other for ids in related.values() for other in ids}
        token_ids = self._catalogue.token_ids(collection.name, [*chunk_ids, *others])
        chunks = [
            PromptChunk(
                c, token_ids[c], tuple(r for r in related.get(c, ()) if r in token_ids), self._config.fuse_behind
            )
            for c in chunk_ids
            if c in token_ids
        ]
        names, prefix = self._engine.prefix(self._prefix_ids)
        names = replace(names, owner=collection.owner)
        config = replace(self._engine.config, max_batch_tokens=self._engine.config.background_tokens)
        job = PreprocessJob(
            self._engine.model, self._engine.store, names, token_ids, config, prefix, self._engine.arena
        )
        booked = {o.digest for o in self._catalogue.kv_objects(collection.name, chunk_ids)}
        try:
            for stored in job.run(chunks):
                if stored.computed or stored.spec.digest not in booked:
                    self._book(collection.name, stored)
                    yield
        except PromptTooLong as error:  # they are computed in place, as long as they fit there
            log.warning("collection %s: %s", collection.name, error)
        seen.done.update(chunk_ids)
        yield

    def _book(self, collection: str, stored: StoredChunk) -> None:
        try:
            self._catalogue.record_kv(collection, [stored.entry])
        except CollectionNotFound:
            self._catalogue.discard_kv([stored.spec.digest])
            raise
