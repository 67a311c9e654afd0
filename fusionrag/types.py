"""The nouns of `fusionrag` and the shape legend. Read this file first.

Shape legend, used in every docstring and at the end of lines:

    L   num_layers            R   rows of one forward pass      V   vocabulary
    H   num_heads (query)     S   slots of the arena            T   tokens of one chunk
    G   num_kv_heads          N   tokens of one request's span  C   chunks of one prompt
    D   head_dim

A **row** is one token to run through the model: (token id, position, slot). Full prefill, selective recompute, decode
and the offline passes are all just different sets of rows.

Invariants kept by these types:
    I1  A request owns a contiguous span of arena slots; slot `span.start + i` holds the token at position `i`.
    I2  A prompt's token ids are the concatenation of its segments' ids; nothing is re-tokenised.
    I3  Stored keys are *before* rotation.
    I5  Everything that changes the bytes of a stored KV is in its `KVSpec`; equal specs ⇔ interchangeable bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from itertools import chain
from typing import Literal, Protocol

import torch

KVKind = Literal["raw", "fused"]
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Span:
    """The arena slots `[start, start + length)` of one request."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


class AttentionObserver:
    """Sees one row group's attention at every layer; by itself it looks at nothing.

    `queries` are rotated; `keys` are the un-rotated keys and `values` the values of the rows themselves. The arena
    already holds the rows' rotated keys when `after_write` runs, and still holds what was there when `before_write`
    runs. Neither may change the rows; of the group's own span, `before_write` may change other slots, and `after_write`
    any slot: what it holds then is what the rows attend to. At the layers in `sums_at` it sees the attention too.
    """

    sums_at: frozenset[int] = frozenset()

    def before_write(self, layer: int, group: RowGroup, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values [G, R, D]: fresh, un-rotated, not yet in the arena."""

    def after_write(self, layer: int, group: RowGroup, queries: torch.Tensor) -> None:
        """queries [H, R, D]: rotated to their positions."""

    def after_attention(self, layer: int, group: RowGroup, queries: torch.Tensor, sums: torch.Tensor | None) -> None:
        """queries [R, H, D], rotated. sums [R, H] fp32: natural log of the sum of exp(scores) over all that a row sees;
        None where the attention does not tell them, or where a window hides part of the span."""


class KVArrival(Protocol):
    """Stored KV on its way into a span, layer by layer."""

    def wait(self, layer: int) -> None:
        """Work queued from now on finds this layer's KV in place. Does not wait for the device."""
        ...

    def wait_for_all(self) -> None:
        """The same for all layers."""
        ...

    @property
    def elapsed_ms(self) -> float:
        """How long it took to arrive; only known once the device is done with it."""
        ...


@dataclass(frozen=True)
class RowGroup:
    """The rows of one request in one forward pass. `positions` ascend; row i lives in slot `span.start + positions[i]`.

    Each row attends to the slots of its own span at positions `<=` its own.
    """

    span: Span
    token_ids: torch.Tensor  # (R,) int64
    positions: torch.Tensor  # (R,) int64, ascending, no duplicates
    num_logits: int = 0  # logits are wanted for the last `num_logits` rows
    observer: AttentionObserver | None = None
    arrival: KVArrival | None = None  # what the rows must wait for
    first_position: int | None = None  # where positions are known, without asking the device, to have no gap; else None
    num_leaving: int = 0  # the first rows, which are run up to their keys and values of layer `leave_from` only
    leave_from: int = 0
    start_on_device: torch.Tensor | None = None  # (1,) int64: the span's start, where it changes in place

    @property
    def num_rows(self) -> int:
        return self.positions.shape[0]

    @property
    def first_slot(self) -> torch.Tensor:
        """(1,) int64, on the device: where position 0 lives."""
        if self.start_on_device is not None:
            return self.start_on_device
        return torch.full((1,), self.span.start, dtype=torch.int64, device=self.positions.device)

    @property
    def last_position(self) -> int:
        return int(self.positions[-1])


@dataclass(frozen=True)
class KVSpec:
    """Names one stored KV. `digest` is the object's name in the store (I5)."""

    model_fingerprint: str
    dtype: str
    codec: str
    prefix_ids: tuple[int, ...]
    chunk_ids: tuple[int, ...]  # the chunk's token ids
    kind: KVKind
    related: tuple[str, ...] = ()  # chunk ids (hashes) in the order in which they stood in front; empty for raw
    owner: str = ""  # whose it is: the same text of somebody else's is another object, so that hits tell nothing
    format_version: int = FORMAT_VERSION

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON of all fields."""
        spelled = json.dumps({f.name: getattr(self, f.name) for f in fields(self)}, sort_keys=True)
        return hashlib.sha256(spelled.encode()).hexdigest()


@dataclass(frozen=True)
class ChunkKV:
    """Keys *before rotation* and values of one chunk. Immutable once built: tiers and requests share it (I4).

    keys, values: (L, G, T, D), same dtype and device.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class SegmentKind(Enum):
    PREFIX = "prefix"  # fixed per collection; its KV is computed once per process
    CHUNK = "chunk"
    TAIL = "tail"  # the caller's own words; always computed


@dataclass(frozen=True)
class PromptChunk:
    """A passage as the engine sees it: its id, its tokens and the chunks its fused KV was computed behind.

    `related` is None when no fused KV is known for it (it is then reused raw, or computed in place).
    """

    chunk_id: str
    token_ids: tuple[int, ...]
    related: tuple[str, ...] | None = None
    fused_behind: str = "all"  # of `related`: one fused KV behind all of them, or one behind each

    @property
    def contexts(self) -> tuple[tuple[str, ...], ...]:
        """What each of its fused KVs stands behind, best first."""
        if not self.related:
            return ()
        return (self.related,) if self.fused_behind == "all" else tuple((other,) for other in self.related)


@dataclass(frozen=True)
class Segment:
    """Positions `[start, stop)` of the prompt."""

    kind: SegmentKind
    start: int
    token_ids: tuple[int, ...]
    chunk: PromptChunk | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class PromptPlan:
    """[prefix][chunk]…[chunk][tail]. `question` is the part of the tail whose attention scores the chunks."""

    segments: tuple[Segment, ...]
    question: tuple[int, int]  # positions [start, stop) inside the tail

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(chain.from_iterable(s.token_ids for s in self.segments))

    @property
    def num_tokens(self) -> int:
        return self.segments[-1].stop

    @property
    def prefix(self) -> Segment:
        return self.segments[0]

    @property
    def tail(self) -> Segment:
        return self.segments[-1]

    @property
    def chunks(self) -> tuple[Segment, ...]:
        return self.segments[1:-1]

    @property
    def num_chunk_tokens(self) -> int:
        return sum(s.num_tokens for s in self.chunks)


class KVSource(Enum):
    """Where a chunk's KV came from, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    COMPUTED = "computed"  # no usable stored object: computed in place, behind what stands there


@dataclass(frozen=True)
class ChunkReceipt:
    """What happened to one chunk of one request."""

    chunk_id: str
    num_tokens: int
    source: KVSource
    kind: KVKind
    num_recomputed: int = 0
    recomputed: tuple[tuple[int, int], ...] = ()  # the chunk's tokens [begin, end) that were; only where explained


@dataclass(frozen=True)
class Phases:
    """Wall-clock milliseconds of a request's way to its first token. They add up to `ttft_ms` but for bookkeeping."""

    queue_ms: float = 0.0
    retrieve_ms: float = 0.0
    load_ms: float = 0.0
    reposition_ms: float = 0.0
    probe_ms: float = 0.0
    select_ms: float = 0.0
    recompute_ms: float = 0.0
    sample_ms: float = 0.0

    def plus(self, **elapsed_ms: float) -> Phases:
        return replace(self, **{name: getattr(self, name) + ms for name, ms in elapsed_ms.items()})


@dataclass(frozen=True)
class RequestStats:
    """The receipt of one request; complete once its first token is out, final once it has finished."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # chunk and prefix tokens whose stored KV was used and not recomputed
    recomputed_tokens: int = 0  # reused tokens that were selected and run again
    computed_tokens: int = 0  # tokens without stored KV (tail, missing chunks, full prefill)
    completion_tokens: int = 0
    ttft_ms: float = 0.0
    way: str = "full"  # how its first token was got: full, prefix or reuse (see `fusionrag.router`)
    predicted_ms: float | None = None  # by the router, for the way taken; None: it went as asked, unpredicted
    predicted_full_ms: float | None = None  # what `ttft_ms` would be with full prefill; None: no rate measured yet
    phases: Phases = field(default_factory=Phases)
    arrival_ms: float = 0.0  # stored KV's way over the link, beside the phases; 0 on the CPU, where it is one of them
    chunks: tuple[ChunkReceipt, ...] = ()


FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TokenEvent:
    """One step of one request's answer. `text` is what became printable with this token (may be '')."""

    request_id: str
    text: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    stats: RequestStats | None = None  # on the first token and on the last event
    error: Exception | None = None
    top_logprobs: Sequence[tuple[int, float]] = ()
