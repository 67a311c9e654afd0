"""The rows of a request's last pass before its first token: selected tokens, then the tail, each at its true position.

Rows ascend, so running them in one pass or in several gives the same result: at every layer each row sees the fresh
rows before it.
"""

from __future__ import annotations

import torch

from fusionrag.arena import KVArena
from fusionrag.model import LanguageModel
from fusionrag.reprocess.correct import MeanResidual
from fusionrag.types import AttentionObserver, PromptPlan


def recompute_positions(plan: PromptPlan, selected: torch.Tensor) -> torch.Tensor:
    """selected (K,) ascending ++ the tail's positions: (R,) ascending."""
    tail = torch.arange(plan.tail.start, plan.num_tokens, device=selected.device)
    return torch.cat([selected, tail])


def correction(
    model: LanguageModel,
    arena: KVArena,
    plan: PromptPlan,
    chunk_of: torch.Tensor,
    selected: torch.Tensor,
    weight: float,
) -> AttentionObserver | None:
    """The observer that corrects the tokens left alone during the recompute pass, or None when there is none to do."""
    if weight == 0 or len(selected) == 0:
        return None
    return MeanResidual(arena, model.rope, plan, chunk_of, selected, weight)
