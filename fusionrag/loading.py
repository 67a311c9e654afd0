"""Bringing stored KV into a request's span.

On the CPU: rotated and written at once. On a GPU: copied over the link on a stream of its own, a few layers of all
chunks at a time, while the passes that need it are already queued and wait for their layer only; what is on the device
already is not copied. Knows nothing of prompts or of what is recomputed.

Invariants: what is in the span afterwards is the same whichever way it came; stored KV is never written to (I4).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch

from fusionrag.arena import KVArena
from fusionrag.kernels.load import ChunkBytes, load_, load_table
from fusionrag.model import LanguageModel
from fusionrag.stitch import place_
from fusionrag.store.base import KVStore, StoredHit
from fusionrag.store.codec import EncodedKV
from fusionrag.store.device import DeviceKV, DeviceTier
from fusionrag.store.link import LayerCopies, LayeredBytes
from fusionrag.types import KVArrival, KVSource, KVSpec, Span

NUM_READERS = 8  # files read at the same time: one does not fill a drive
# Layers per copy: few at first, so that passes begin early, then enough that queueing keeps up with the link. A pass
# that ends at three quarters of 28 or of 32 layers, as the probe does, waits for no layer above.
FIRST_RUNS, LAYERS_AT_ONCE = (1, 2), 3
RUNS_IN_ADVANCE = 2  # queued before anything waits for them: the link is busy while the first pass is prepared


@dataclass(frozen=True)
class Found:
    """Stored KV that may stand for a chunk, and where it was."""

    spec: KVSpec
    source: KVSource
    payload: EncodedKV | DeviceKV


@dataclass(frozen=True)
class Piece:
    """KV that belongs at positions `[position, position + T)` of a span."""

    position: int
    payload: EncodedKV | DeviceKV
    digest: str | None = None  # its name in the store, where it has one


class Loader(Protocol):
    """Finds stored KV and brings it into spans. Belongs to the engine's thread."""

    def locate(self, candidates: Sequence[Sequence[KVSpec]]) -> list[KVSource | None]:
        """For each chunk the tier that its KV would come from, without bringing it; None: it is not stored."""
        ...

    def find(self, candidates: Sequence[Sequence[KVSpec]]) -> Iterator[Found | None]:
        """For each chunk the first of its candidates that is stored, or None; in order, read ahead from disk."""
        ...

    def read_ahead(self, candidates: Sequence[Sequence[KVSpec]]) -> None:
        """Has what lies on disk read into host memory, sometime, for those who come later."""
        ...

    def place_(
        self, arena: KVArena, span: Span, pieces: Sequence[Piece], send: Callable[[], object]
    ) -> KVArrival | None:
        """Writes all pieces into the span. None: they are there; else what to wait for.

        send: has small things sent to the device, which are there for what is queued from now on: behind the first
        layers' KV, so that the link is busy meanwhile, and in front of all other layers'.
        """
        ...


def make_loader(model: LanguageModel, store: KVStore, device_tier_bytes: int) -> Loader:
    if model.device.type == "cuda":
        return GpuLoader(model, store, device_tier_bytes)
    return CpuLoader(model, store)


class _Finder:
    """What both loaders share: looking in memory first, then reading several files at a time."""

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="kv-reader")
        self._being_read: set[str] = set()  # ahead, by the name of the first candidate

    def locate(self, candidates: Sequence[Sequence[KVSpec]]) -> list[KVSource | None]:
        return [self._tier_of(specs) for specs in candidates]

    def _tier_of(self, specs: Sequence[KVSpec]) -> KVSource | None:
        held = self._first_held(specs)
        if held is not None:
            return held.source
        return KVSource.DISK if any(self._store.contains(spec) for spec in specs) else None

    def find(self, candidates: Sequence[Sequence[KVSpec]]) -> Iterator[Found | None]:
        found: list[Found | Future[Found | None] | None] = []
        for specs in candidates:
            held = self._first_held(specs)
            found.append(held if held is not None else self._pool.submit(self._search, specs))
        for item in found:
            yield item.result() if isinstance(item, Future) else item

    def read_ahead(self, candidates: Sequence[Sequence[KVSpec]]) -> None:
        for specs in candidates:
            name = specs[0].digest
            if name not in self._being_read and self._tier_of(specs) is KVSource.DISK:
                self._being_read.add(name)
                self._pool.submit(self._read, name, specs)

    def _read(self, name: str, specs: Sequence[KVSpec]) -> None:
        self._search(specs)
        self._being_read.discard(name)

    def _first_held(self, specs: Sequence[KVSpec]) -> Found | None:
        """What can be had without reading a file, of the first candidate that is stored at all."""
        for spec in specs:
            held = self._held(spec)
            if held is not None or self._store.contains(spec):
                return held
        return None

    def _held(self, spec: KVSpec) -> Found | None:
        hit = self._store.recall(spec)
        return None if hit is None else Found(spec, hit.source, hit.payload)

    def _search(self, specs: Sequence[KVSpec]) -> Found | None:
        for spec in specs:
            hit: StoredHit | None = self._store.get(spec)
            if hit is not None:
                return Found(spec, hit.source, hit.payload)
        return None


class CpuLoader(_Finder):
    """Everything is in place when `place_` returns."""

    def __init__(self, model: LanguageModel, store: KVStore) -> None:
        super().__init__(store)
        self._rope = model.rope

    def place_(self, arena: KVArena, span: Span, pieces: Sequence[Piece], send: Callable[[], object]) -> None:
        send()
        for piece in pieces:
            assert isinstance(piece.payload, EncodedKV)
            place_(arena, self._rope, span, piece.position, piece.payload.kv)


def layer_runs(num_layers: int) -> list[range]:
    """The layers whose KV crosses the link together, and which a pass in pieces runs together."""
    ends = list(accumulate(FIRST_RUNS))
    ends = [*ends, *range(ends[-1] + LAYERS_AT_ONCE, num_layers + LAYERS_AT_ONCE, LAYERS_AT_ONCE)]
    runs = (range(begin, min(end, num_layers)) for begin, end in pairwise([0, *ends]))
    return [run for run in runs if run]


class LayerArrival:
    """KV on its way over the link, some layers at a time.

    Queueing takes the host time too, so a run of layers is placed when something has been queued that runs meanwhile:
    when its first layer is waited for, and no later than the second layer of the run before it. Copies are queued a run
    ahead of that, so that the link does not wait for the host.
    """

    def __init__(
        self,
        copy: Callable[[slice], torch.cuda.Event],
        place: Callable[[slice, torch.cuda.Event], torch.cuda.Event],
        num_layers: int,
        begin: torch.cuda.Event,
    ) -> None:
        """copy: brings some layers on their way, and tells when they are here; place: from then on, into the span, and
        tells when they are there. Together they keep alive what that needs."""
        self._runs = layer_runs(num_layers)
        self._run_of = [i for i, run in enumerate(self._runs) for _ in run]
        self._copy, self._place, self._begin = copy, place, begin
        self._copied, self._placed = list[torch.cuda.Event](), list[torch.cuda.Event]()
        self._place_until(RUNS_IN_ADVANCE - 1)

    def wait(self, layer: int) -> None:
        own = self._run_of[layer]
        self._place_until(own)
        if layer == self._runs[own].start:
            torch.cuda.current_stream().wait_event(self._placed[own])
        else:  # waited for already
            self._place_until(own + 1)

    def wait_for_all(self) -> None:
        self.queue_all()
        torch.cuda.current_stream().wait_event(self._placed[-1])

    def queue_all(self) -> None:
        self._place_until(len(self._runs) - 1)

    def _place_until(self, last: int) -> None:
        for i in range(len(self._placed), min(last + 1, len(self._runs))):
            for run in self._runs[len(self._copied) : i + 2]:
                self._copied.append(self._copy(slice(run.start, run.stop)))
            run = self._runs[i]
            self._placed.append(self._place(slice(run.start, run.stop), self._copied[i]))

    @property
    def elapsed_ms(self) -> float:
        """From the first copy to the last layer in place; only once the device is done with it."""
        return float(self._begin.elapsed_time(self._placed[-1]))


class GpuLoader(_Finder):
    """Copies on one stream, de-quantising, rotating and scattering on another, passes on the caller's."""

    def __init__(self, model: LanguageModel, store: KVStore, device_tier_bytes: int) -> None:
        super().__init__(store)
        self._model = model
        self._tier = DeviceTier(device_tier_bytes, model.device)
        self._copies = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        self._placing = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        self._latest: weakref.ref[LayerArrival] | None = None

    def _held(self, spec: KVSpec) -> Found | None:
        resident = self._tier.get(spec.digest)
        return super()._held(spec) if resident is None else Found(spec, KVSource.DEVICE, resident)

    def place_(self, arena: KVArena, span: Span, pieces: Sequence[Piece], send: Callable[[], object]) -> LayerArrival:
        latest = None if self._latest is None else self._latest()
        if latest is not None:
            latest.queue_all()  # the tier already names as its own what is still to be copied
        self._placing.wait_stream(torch.cuda.current_stream())  # passes still queued may use these slots
        self._copies.wait_stream(self._placing)  # and placing still queued may read these bytes
        begin = _recorded(self._copies)
        placed = list(zip(pieces, self._reserve(pieces), strict=True))
        crossing, apart = list[LayeredBytes](), list[tuple[DeviceKV, EncodedKV]]()
        for piece, kv in placed:
            if isinstance(piece.payload, EncodedKV):
                link = kv.link(piece.payload)
                if link is None:
                    apart.append((kv, piece.payload))
                else:
                    crossing.append(link)
        copies, launches = LayerCopies(crossing), list[_Launch]()

        def copy(layers: slice) -> torch.cuda.Event:
            copies.queue(layers, self._copies.cuda_stream)
            with torch.cuda.stream(self._copies):
                for kv, payload in apart:
                    kv.copy_layers_(payload, layers)
                if layers.start == 0:  # on this stream: another one's copies would wait for the last layer
                    launches.extend(_Launch(self._model, arena, span, members) for members in _alike(placed))
                    send()
            return _recorded(self._copies)

        def place(layers: slice, copied: torch.cuda.Event) -> torch.cuda.Event:
            self._placing.wait_event(copied)
            with torch.cuda.stream(self._placing):
                for launch in launches:
                    launch.run(layers)
            return _recorded(self._placing)

        arrival = LayerArrival(copy, place, self._model.shape.num_layers, begin)
        arrival.wait(0)  # for what was sent; the first layer itself is needed next
        self._latest = weakref.ref(arrival)
        return arrival

    def _reserve(self, pieces: Sequence[Piece]) -> list[DeviceKV]:
        """Each piece's place on the device, its bytes still to come where they are not there."""
        absent = [(p.payload, p.digest) for p in pieces if isinstance(p.payload, EncodedKV)]
        with torch.cuda.stream(self._copies):
            reserved = iter(self._tier.reserve(absent))
        return [p.payload if isinstance(p.payload, DeviceKV) else next(reserved) for p in pieces]


def _alike(placed: Sequence[tuple[Piece, DeviceKV]]) -> Iterable[list[tuple[Piece, DeviceKV]]]:
    """What one launch can take: of one kind, in one buffer, and either there or still to come."""
    launches: dict[Hashable, list[tuple[Piece, DeviceKV]]] = {}
    for piece, kv in placed:
        key = kv.buffer.data_ptr(), kv.codec, kv.dtype, piece.payload is kv
        launches.setdefault(key, []).append((piece, kv))
    return launches.values()


class _Launch:
    """De-quantises, rotates and scatters some pieces, a run of layers at a time; all launches on one stream.

    What is on the device already does not wait for runs of layers: all that is left of it comes with the second.
    """

    def __init__(
        self, model: LanguageModel, arena: KVArena, span: Span, members: Sequence[tuple[Piece, DeviceKV]]
    ) -> None:
        self._model, self._arena, self._members = model, arena, members
        self._is_resident = members[0][0].payload is members[0][1]
        self._max_tokens = max(kv.num_tokens for _, kv in members)
        self._next = 0  # layer
        rows = [
            ChunkBytes(
                kv.offset("kv"),
                kv.offset("key_scales"),
                kv.offset("value_scales"),
                kv.num_tokens,
                span.start + piece.position,
                piece.position,
            )
            for piece, kv in members
        ]
        self._table = load_table(rows, model.device)

    def run(self, layers: slice) -> None:
        stop = self._model.shape.num_layers if self._is_resident and layers.start else layers.stop
        if stop == self._next:
            return
        own, (_, kv), rope = slice(self._next, stop), self._members[0], self._model.rope
        keys, values = self._arena.keys[own], self._arena.values[own]
        table, self._next = self._table, stop
        load_(
            kv.buffer, table, self._max_tokens, kv.codec, kv.dtype, rope.inv_freq, rope.scaling, keys, values, own.start
        )


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
