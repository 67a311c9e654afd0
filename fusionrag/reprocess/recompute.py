"""The rows of a request's last pass before its first token: selected tokens, then the tail, each at its true position.

Rows ascend, so running them in one pass or in several gives the same result: at every layer each row sees the fresh
rows before it.
"""

from __future__ import annotations

import torch

from fusionrag.arena import KVArena
from fusionrag.config import ReuseConfig
from fusionrag.model import LanguageModel
from fusionrag.reprocess.blend import GradualFilter
from fusionrag.reprocess.correct import MeanResidual
from fusionrag.types import AttentionObserver, PromptPlan


def recompute_positions(plan: PromptPlan, selected: torch.Tensor) -> torch.Tensor:
    """selected (K,) ascending ++ the tail's positions: (R,) ascending."""
    tail = torch.arange(plan.tail.start, plan.num_tokens, device=selected.device)
    return torch.cat([selected, tail])


def recompute_observer(
    model: LanguageModel,
    arena: KVArena,
    plan: PromptPlan,
    borders: torch.Tensor,
    selected: torch.Tensor,
    config: ReuseConfig,
) -> AttentionObserver | None:
    """What acts between the layers of the recompute pass, if anything does: a correction, or CacheBlend's filter.

    borders: (C + 1,) int64, where each chunk begins, and the tail.
    """
    if len(selected) == 0:
        return None
    if config.method == "cacheblend_gradual":
        return GradualFilter(arena, model.rope, selected, model.shape.num_layers)
    if config.correction == 0:
        return None
    return MeanResidual(arena, model.rope, plan.num_tokens, borders, config.correction)
