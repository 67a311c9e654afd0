"""Importance carried over from one passage to another that names the same thing.

A question in two steps matches the passage of its first step; the second step's passage is matched by what the first
one names. Attention of the question does not see that. But the name stands in both, as the same tokens: so what a pair
of adjacent tokens is worth in one chunk is carried over to where it stands in other chunks, the more the fewer have it.

Knows nothing of models. The places are found on the host, from token ids alone, so that no value is read back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fusionrag.types import PromptPlan


@dataclass(frozen=True)
class RepeatedPairs:
    """Pairs of adjacent tokens that stand in some chunks, not in all. All (P,), on the scores' device.

    first: positions of the pair's first token; cell: its pair and chunk as one number below `num_pairs * num_chunks`;
    weight: log(chunks / chunks that have it).
    """

    first: torch.Tensor
    cell: torch.Tensor
    weight: torch.Tensor
    num_pairs: int
    num_chunks: int


def repeated_pairs(plan: PromptPlan, device: torch.device) -> RepeatedPairs:
    ids = np.asarray(plan.token_ids, dtype=np.int64)
    chunks = plan.chunks
    first = np.concatenate([np.arange(s.start, s.stop - 1) for s in chunks] or [np.empty(0, np.int64)])
    chunk = np.repeat(np.arange(len(chunks)), [max(0, s.num_tokens - 1) for s in chunks])
    _, pair = np.unique(ids[first] * (ids.max(initial=0) + 1) + ids[first + 1], return_inverse=True)
    cells = np.unique(pair * len(chunks) + chunk)
    having = np.bincount(cells // max(1, len(chunks)), minlength=len(first))  # chunks that have each pair
    shared = (having[pair] > 1) & (having[pair] < len(chunks))
    first, chunk, pair, having = first[shared], chunk[shared], pair[shared], having[pair[shared]]
    kept, pair = np.unique(pair, return_inverse=True)
    weight = np.log(len(chunks) / having, dtype=np.float32) if len(first) else np.empty(0, np.float32)
    first_, cell, weight_ = (
        torch.from_numpy(a).to(device, non_blocking=True) for a in (first, pair * len(chunks) + chunk, weight)
    )
    return RepeatedPairs(first_, cell, weight_, len(kept), len(chunks))


def carried_over(importance: torch.Tensor, pairs: RepeatedPairs) -> torch.Tensor:
    """importance: (N,). Returns (N,): for each token, what the pairs that it is part of are worth in other chunks.

    A pair is worth in a chunk what its best place there is; a token gets half of its pair's.
    """
    carried = torch.zeros_like(importance)
    worth = importance[pairs.first] + importance[pairs.first + 1]
    best = importance.new_zeros(pairs.num_pairs * pairs.num_chunks)
    best.scatter_reduce_(0, pairs.cell, worth, "amax")
    everywhere = best.view(pairs.num_pairs, pairs.num_chunks).sum(1)
    share = pairs.weight * (everywhere[pairs.cell // pairs.num_chunks] - best[pairs.cell]) / 2
    carried[pairs.first] = share  # each position is the first of one pair, and the second of one
    carried[pairs.first + 1] += share
    return carried
