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
from dataclasses import dataclass

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
from fusionrag.types import KVArrival, PromptPlan, RowGroup, Span

CACHEBLEND_LAYER = (
    1  # keys and values of layer 0 do not depend on the context, so layer 1 is the first that can deviate
)


@dataclass(frozen=True)
class ScoreInputs:
    """A stitched request. `chunk_of`: (N,) int64, the chunk of each position or -1; `candidates`: (K,) ascending."""

    model: LanguageModel
    arena: KVArena
    span: Span
    plan: PromptPlan
    chunk_of: torch.Tensor
    candidates: torch.Tensor
    config: ReuseConfig
    seed: int = 0
    arrival: KVArrival | None = None  # stored KV that is still on its way into the span

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
    layers = parse_layers(inputs.config.probe_layers, inputs.model.shape.num_layers)
    probe = _AttentionProbe(inputs, layers)
    _run_tail(inputs, probe)
    carry, candidates, importance = inputs.config.carry, inputs.candidates, probe.importance
    if carry:
        carried = carried_over(importance, repeated_pairs(inputs.plan, importance.device))
        scale = importance[candidates].sum() / carried[candidates].sum().clamp(min=1e-20)
        importance = importance + carry * scale * carried
    return importance


def fusionrag_scores(inputs: ScoreInputs) -> torch.Tensor:
    """The published rule as coded: last layer, keys at canonical positions, softmax within each chunk."""
    probe = _CanonicalProbe(inputs)
    _run_tail(inputs, probe)
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
    """'all', 'late' (upper half), 'last', or ranges such as '8-19,25'. Raises ConfigError on anything else."""
    named = {
        "all": range(num_layers),
        "late": range(num_layers // 2, num_layers),
        "last": range(num_layers - 1, num_layers),
    }
    if text in named:
        return frozenset(named[text])
    layers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        if not found:
            raise ConfigError("probe_layers", f"{text!r}: expected all, late, last or ranges such as 8-19,25")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < num_layers:
            raise ConfigError("probe_layers", f"{text!r}: the model has layers 0 to {num_layers - 1}")
        layers |= set(range(first, last + 1))
    return frozenset(layers)


def _run_tail(inputs: ScoreInputs, probe: _Probe) -> None:
    tail = inputs.plan.tail
    ids, positions = inputs.model.rows(tail.token_ids, tail.start)
    _observe(inputs.model, RowGroup(inputs.span, ids, positions, observer=probe, arrival=inputs.arrival), inputs.arena)


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


class _Probe:
    """Common parts: where the chunks are, and the scores so far."""

    def __init__(self, inputs: ScoreInputs) -> None:
        self.inputs = inputs
        self.importance = torch.zeros(inputs.plan.num_tokens, device=inputs.model.device)

    def before_write(self, layer: int, group: RowGroup, keys: torch.Tensor, values: torch.Tensor) -> None:
        pass

    def after_write(self, layer: int, group: RowGroup, queries: torch.Tensor) -> None:
        pass


class _AttentionProbe(_Probe):
    def __init__(self, inputs: ScoreInputs, layers: frozenset[int]) -> None:
        super().__init__(inputs)
        self.layers = layers
        self._rows: RowPlan | None = None  # planned at the first probed layer

    def after_write(self, layer: int, group: RowGroup, queries: torch.Tensor) -> None:
        if layer in self.layers:
            last = self.inputs.probe_rows[1]
            mass = self._mass(layer, group, queries.transpose(0, 1))
            if self.inputs.config.normalize_layers:
                mass = mass / mass[self.inputs.candidates].sum().clamp(min=1e-20)
            self.importance[:last] += mass / len(self.layers)
        if layer == max(self.layers):
            raise StopForward

    def _mass(self, layer: int, group: RowGroup, queries: torch.Tensor) -> torch.Tensor:
        """queries (R, H, D) of the tail → (last,) attention that each position receives from the probing rows."""
        (first, last), begin = self.inputs.probe_rows, self.inputs.plan.tail.start
        arena, scaling = self.inputs.arena, queries.shape[2] ** -0.5
        if self._rows is None:
            self._rows = self._plan(group, queries.dtype)
        lse = None
        if self._rows.tiles is not None:  # the kernel wants every row's softmax sum, which attention gives
            lse = torch.empty(queries.shape[:2], dtype=torch.float32, device=queries.device)
            rows_attention(queries, arena.keys[layer], arena.values[layer], self._rows, scaling, lse=lse)
        return attention_mass(queries, arena.keys[layer], self._rows, (first - begin, last - begin), last, scaling, lse)

    def _plan(self, group: RowGroup, dtype: torch.dtype) -> RowPlan:
        shape, span = self.inputs.model.shape, group.span
        rows = [RequestRows(0, group.num_rows, span.start, span.length)]
        slots = group.positions + span.start
        return plan_rows(group.positions, slots, rows, shape.num_heads, shape.num_kv_heads, shape.head_dim, dtype)


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
