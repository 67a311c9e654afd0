"""Which positions to recompute: the best candidates by importance, within the budget.

Knows nothing of models: importance in, positions out. Prefix and tail are never candidates; `ceil(ratio × reused)`
positions are taken, ties broken by position so that the same scores always give the same selection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fusionrag.clock import Mark
from fusionrag.reprocess import blend, probe

SCORERS: dict[str, probe.Scorer] = {
    "attention": probe.attention_scores,
    "fusionrag": probe.fusionrag_scores,
    "cacheblend": probe.cacheblend_scores,
    "cacheblend_gradual": probe.cacheblend_gradual_scores,
    "epic": probe.epic_scores,
    "random": probe.random_scores,
}


def budget(recompute_ratio: float, num_reused: int, num_candidates: int) -> int:
    """`ceil(ratio × reused tokens)`, at most all candidates. Rounding noise of the product does not add a token."""
    return min(math.ceil(round(recompute_ratio * num_reused, 6)), num_candidates)


def select(importance: torch.Tensor, candidates: torch.Tensor, num_selected: int) -> torch.Tensor:
    """importance: (N,); candidates: (K,) ascending positions. Returns (num_selected,) ascending positions."""
    order = importance[candidates].sort(descending=True, stable=True).indices[:num_selected]
    return candidates[order].sort().values


@dataclass(frozen=True)
class Selection:
    """positions: (K,) ascending; the moments before and after scoring, and after selecting."""

    positions: torch.Tensor
    begin: Mark
    probed: Mark
    selected: Mark


def choose(inputs: probe.ScoreInputs, num_reused: int) -> Selection:
    """Scores and selects as the request's configuration says; nothing is scored where all or none are taken."""
    config, candidates, device = inputs.config, inputs.candidates, inputs.model.device
    ratio = config.effective_ratio * (blend.START if config.method == "cacheblend_gradual" else 1)
    num_selected = budget(ratio, num_reused, len(candidates))
    begin = Mark.now(device)
    if num_selected in (0, len(candidates)):
        return Selection(candidates[:num_selected], begin, begin, begin)
    importance = SCORERS[config.method](inputs)
    probed = Mark.now(device)
    positions = select(importance, candidates, num_selected)
    return Selection(positions, begin, probed, Mark.now(device))
