"""How important is each reused token for this question? Scores by attention, by KV deviation, by place, at random.

Every scorer has the same signature, `(ScoreInputs) -> (N,) fp32 importance` over the prompt's positions; higher is
recomputed first, and only candidates are looked at. What a scorer costs is part of the request's time to first token.

Sources: `fusionrag` – arXiv 2601.12904 §3.2 as its code has it; `attention` over all layers – ProphetKV (2602.02579),
at true positions as InfoFlow KV (2603.05353) argues; `cacheblend` – 2405.16444; `epic` – 2410.15332.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fusionrag.arena import KVArena
from fusionrag.attention import StopForward
from fusionrag.config import ReuseConfig
from fusionrag.errors import ConfigError
from fusionrag.kernels.importance import attention_mass
from fusionrag.kernels.row_plan import RequestRows, RowPlan, plan_rows
from fusionrag.kernels.rows_attention import rows_attention
from fusionrag.model import LanguageModel
from fusionrag.reprocess.links import carried_over, repeated_pairs
from fusionrag.types import AttentionObserver, KVArrival, PromptPlan, RowGroup, Span

CACHEBLEND_LAYER = (
    1  # keys and values of layer 0 do not depend on the context, so layer 1 is the first that can deviate
)


@dataclass(frozen=True)
class ScoreInputs:
    """A stitched request. `candidates`: (K,) int64, ascending."""

    model: LanguageModel
    arena: KVArena
    span: Span
    plan: PromptPlan
    candidates: torch.Tensor
    config: ReuseConfig
    seed: int = 0
    arrival: KVArrival | None = None  # stored KV that is still on its way into the span
    passes: RequestPasses | None = None  # with buffers that stay, where the device has them
    tail: tuple[torch.Tensor, torch.Tensor] | None = None  # token ids and positions of its rows; made if None

    @property
    def probe_rows(self) -> tuple[int, int]:
        """Rows of the tail [first, last) whose attention is added up."""
        return (
            self.plan.question if self.config.probe_rows == "question" else (self.plan.tail.start, self.plan.num_tokens)
        )


Scorer = Callable[[ScoreInputs], torch.Tensor]


def attention_scores(inputs: ScoreInputs) -> torch.Tensor:
    """Attention that the question's rows pay to each token, at true positions, one softmax over the whole prompt.

    Mean over the configured layers, sum over heads and rows. With all layers this is ProphetKV's rule. With
    `normalize_layers` each layer's mass on the candidates is scaled to 1 first, so that no layer outvotes the others.
    With `carry` some of it also counts where other chunks name the same thing.
    """
    importance = _tail_attention(inputs)
    carry, candidates = inputs.config.carry, inputs.candidates
    if carry:
        carried = carried_over(importance, repeated_pairs(inputs.plan, importance.device))
        scale = importance[candidates].sum() / carried[candidates].sum().clamp(min=1e-20)
        importance = importance + carry * scale * carried
    return importance


def fusionrag_scores(inputs: ScoreInputs) -> torch.Tensor:
    """The published rule as coded: last layer, keys at canonical positions, softmax within each chunk."""
    probe = _CanonicalProbe(inputs)
    _observe(inputs.model, replace(_tail(inputs), observer=probe), inputs.arena)
    return probe.importance


def cacheblend_scores(inputs: ScoreInputs) -> torch.Tensor:
    """As its code has it: squared deviation of fresh from stored values at layer 1, all chunk tokens run to there.

    Leaves the arena as it was but for layer 0, whose keys and values are the same in every context.
    """
    return _deviation(inputs, with_keys=False)


def cacheblend_gradual_scores(inputs: ScoreInputs) -> torch.Tensor:
    """As the paper has it: keys and values. Where the gradual filter starts; `blend` has the rest."""
    return _deviation(inputs, with_keys=True)


def epic_scores(inputs: ScoreInputs) -> torch.Tensor:
    """The first tokens of every chunk, all chunks alike."""
    importance = torch.zeros(inputs.plan.num_tokens, device=inputs.model.device)
    for segment in inputs.plan.chunks:
        importance[segment.start : segment.stop] = -torch.arange(segment.num_tokens, device=importance.device).float()
    return importance


def random_scores(inputs: ScoreInputs) -> torch.Tensor:
    """Uniform noise from the request's seed: the floor that every rule must beat."""
    generator = torch.Generator().manual_seed(inputs.seed)
    return torch.rand(inputs.plan.num_tokens, generator=generator).to(inputs.model.device)


def parse_layers(text: str, num_layers: int) -> frozenset[int]:
    """'all', 'late' (upper half), 'third-quarter' (its lower part), 'last', or ranges such as '8-19,25'.

    Raises ConfigError on anything else.
    """
    named = {
        "all": range(num_layers),
        "late": range(num_layers // 2, num_layers),
        "third-quarter": range(num_layers // 2, max(num_layers // 2 + 1, -(-3 * num_layers // 4))),
        "last": range(num_layers - 1, num_layers),
    }
    if text in named:
        return frozenset(named[text])
    layers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        if not found:
            raise ConfigError("probe_layers", f"{text!r}: expected {', '.join(named)} or ranges such as 8-19,25")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < num_layers:
            raise ConfigError("probe_layers", f"{text!r}: the model has layers 0 to {num_layers - 1}")
        layers |= set(range(first, last + 1))
    return frozenset(layers)


def _tail_attention(inputs: ScoreInputs) -> torch.Tensor:
    """(N,) fp32: mean over the configured layers of the attention that the probing rows pay to each position."""
    config, model, num_tokens = inputs.config, inputs.model, inputs.plan.num_tokens
    layers = parse_layers(config.probe_layers, model.shape.num_layers)
    first, last = inputs.probe_rows
    rows = range(first - inputs.plan.tail.start, last - inputs.plan.tail.start)
    group = _tail(inputs)
    if inputs.passes is not None:
        found = inputs.passes.probe(group, layers, rows, config.normalize_layers, inputs.candidates)
        if found is not None:
            return found[:num_tokens]
    is_candidate = torch.zeros(num_tokens, device=model.device).index_fill_(0, inputs.candidates, 1.0)
    probe = AttentionProbe(inputs.arena, layers, rows, is_candidate, config.normalize_layers)
    _observe(model, replace(group, observer=probe), inputs.arena)
    return probe.importance


def _tail(inputs: ScoreInputs) -> RowGroup:
    tail = inputs.plan.tail
    rows = inputs.tail or inputs.model.rows(tail.token_ids, tail.start)
    return RowGroup(inputs.span, *rows, arrival=inputs.arrival)


def _observe(model: LanguageModel, group: RowGroup, arena: KVArena) -> None:
    """A forward pass for its observer's sake; ends when the observer has seen enough."""
    with contextlib.suppress(StopForward):
        model.forward([group], arena)


def _deviation(inputs: ScoreInputs, with_keys: bool) -> torch.Tensor:
    probe = _DeviationProbe(inputs, with_keys)
    stop = inputs.plan.tail.start
    rows = inputs.model.rows(inputs.plan.token_ids[:stop])
    group = RowGroup(inputs.span, *rows, observer=probe, arrival=inputs.arrival, first_position=0)
    _observe(inputs.model, group, inputs.arena)
    return probe.importance


class AttentionProbe(AttentionObserver):
    """Adds up the attention that some rows of its group pay to each position; ends the pass when it has seen enough.

    rows: those whose attention counts. is_candidate: (N,) fp32, 1 where a token may be selected, else 0. hidden_rows:
    (R,) fp32, infinite for rows that do not count after all, 0 for others. plan: of the group's rows alone, without a
    window; made if None. What the last two hold may change in place.
    """

    def __init__(
        self,
        arena: KVArena,
        layers: frozenset[int],
        rows: range,
        is_candidate: torch.Tensor,
        normalize_layers: bool,
        hidden_rows: torch.Tensor | None = None,
        plan: RowPlan | None = None,
    ) -> None:
        self.sums_at, self.importance = layers, torch.zeros_like(is_candidate)
        self._arena, self._rows, self._is_candidate, self._normalize = arena, rows, is_candidate, normalize_layers
        self._hidden_rows, self._plan = hidden_rows, plan

    def after_attention(self, layer: int, group: RowGroup, queries: torch.Tensor, sums: torch.Tensor | None) -> None:
        keys, scaling = self._arena.keys[layer], queries.shape[2] ** -0.5
        if self._plan is None:
            self._plan = _plan_alone(group, queries.shape[1], keys)
        if sums is None and self._plan.tiles is not None:  # the kernel wants every row's softmax sum
            sums = torch.empty(queries.shape[:2], dtype=torch.float32, device=queries.device)
            rows_attention(queries, keys, self._arena.values[layer], self._plan, scaling, lse=sums)
        if sums is not None and self._hidden_rows is not None:
            sums = sums + self._hidden_rows[:, None]
        rows, num_keys = (self._rows.start, self._rows.stop), len(self.importance)
        mass = attention_mass(queries, keys, self._plan, rows, num_keys, scaling, sums)
        if self._normalize:
            mass = mass / torch.dot(mass, self._is_candidate).clamp(min=1e-20)
        self.importance.add_(mass, alpha=1 / len(self.sums_at))
        if layer == max(self.sums_at):
            raise StopForward


def _plan_alone(group: RowGroup, num_heads: int, keys: torch.Tensor) -> RowPlan:
    """Of this group's rows and no others, without a window. keys: (G, S, D), one layer of the arena."""
    rows = [RequestRows(0, group.num_rows, group.span.start, group.span.length)]
    slots = group.positions + group.first_slot
    return plan_rows(group.positions, slots, rows, num_heads, keys.shape[0], keys.shape[2], keys.dtype)


class RequestPasses(Protocol):
    """Passes of one request in buffers that stay (`fusionrag.static_passes`)."""

    def probe(
        self, group: RowGroup, layers: frozenset[int], rows: range, normalize: bool, candidates: torch.Tensor
    ) -> torch.Tensor | None:
        """As `AttentionProbe`: at least (N,) importance, valid until the next pass; None where it has no buffers.

        candidates: (K,) int64 positions.
        """
        ...


class _Probe(AttentionObserver):
    """Common parts: where the chunks are, and the scores so far."""

    def __init__(self, inputs: ScoreInputs) -> None:
        self.inputs = inputs
        self.importance = torch.zeros(inputs.plan.num_tokens, device=inputs.model.device)


class _CanonicalProbe(_Probe):
    def after_write(self, layer: int, group: RowGroup, queries: torch.Tensor) -> None:
        model, plan = self.inputs.model, self.inputs.plan
        if layer != model.shape.num_layers - 1:
            return
        first, last = self.inputs.probe_rows
        rows = queries[:, first - plan.tail.start : last - plan.tail.start]
        grouped = rows.reshape(model.shape.num_kv_heads, -1, model.shape.head_dim)
        keys, _ = self.inputs.arena.view(layer, group.span)
        canonical_start = plan.prefix.stop
        for segment in plan.chunks:
            shift = torch.full((segment.num_tokens,), canonical_start - segment.start, device=keys.device)
            chunk_keys = model.rope.shift(keys[:, segment.start : segment.stop], shift)
            scores = torch.matmul(grouped, chunk_keys.transpose(1, 2)).float() * model.shape.head_dim**-0.5
            self.importance[segment.start : segment.stop] = scores.softmax(-1).sum((0, 1))
        raise StopForward


class _DeviationProbe(_Probe):
    def __init__(self, inputs: ScoreInputs, with_keys: bool) -> None:
        super().__init__(inputs)
        self._with_keys = with_keys

    def before_write(self, layer: int, group: RowGroup, keys: torch.Tensor, values: torch.Tensor) -> None:
        if layer < CACHEBLEND_LAYER:
            return
        rope, n = self.inputs.model.rope, group.num_rows
        stored_keys, stored_values = self.inputs.arena.view(layer, group.span)
        self.importance[:n] = (values - stored_values[:, :n]).float().pow(2).sum((0, 2))
        if self._with_keys:
            fresh = rope.rotate(keys, *rope.tables(group.positions))  # rotation keeps distances
            self.importance[:n] += (fresh - stored_keys[:, :n]).float().pow(2).sum((0, 2))
        raise StopForward
