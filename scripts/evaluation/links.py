"""How often the passages that a question needs together are stored together, from texts alone.

A question in two steps needs the passage that names a thing and the passage about that thing. The answer's KV is as
good as recomputed where one of their chunks is stored behind the other. Knows nothing of models or KV.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scripts.evaluation.datasets import Example, Passage, hop_order


@dataclass(frozen=True)
class LinkRow:
    """Shares of the two-step questions.

    stored: one of the two gold passages is among the related ones of the other; in_order: the one that stands in front
    is among those of the one behind it, which is what full prefill would have seen; n: two-step questions.
    """

    num_related: int
    stored: float
    in_order: float
    n: int


def two_step(examples: Sequence[Example]) -> list[Example]:
    return [e for e in examples if hop_order(e) is not None]


def link_rows(examples: Sequence[Example], related: Mapping[int, Mapping[Passage, Sequence[Passage]]]) -> list[LinkRow]:
    """related: for each number of related passages, those of each passage. Only two-step questions count."""
    asked = two_step(examples)
    rows = []
    for num, of in related.items():
        pairs = [tuple(e.passages[place] for place in sorted(e.gold)) for e in asked]
        in_order = [front in of[behind] for front, behind in pairs]
        stored = [behind in of[front] or found for (front, behind), found in zip(pairs, in_order, strict=True)]
        count = max(1, len(asked))
        rows.append(LinkRow(num, sum(stored) / count, sum(in_order) / count, len(asked)))
    return rows


def format_rows(rows: Sequence[LinkRow]) -> str:
    lines = ["num_related  stored  in order    n"]
    lines += [f"{r.num_related:11d}  {r.stored:6.1%}  {r.in_order:8.1%} {r.n:4d}" for r in rows]
    return "\n".join(lines)
