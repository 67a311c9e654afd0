"""An endless stream of packed rows, made by worker processes while the accelerator is busy.

Invariant: a seed and a number of workers give the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from scripts.reader.branches import Rows, Tree, pack
from scripts.reader.config import TrainingConfig
from scripts.reader.contexts import Composer, Context
from scripts.reader.encoding import Encoder


class RowStream(IterableDataset[Rows]):
    """Contexts, composed and encoded one after the other, packed."""

    def __init__(self, composer: Composer, encoder: Encoder, config: TrainingConfig) -> None:
        self._composer, self._encoder, self._config = composer, encoder, config

    def __iter__(self) -> Iterator[Rows]:
        worker = get_worker_info()
        rng = Random(f"{self._config.seed}:{worker.id if worker else 0}")
        num_workers = worker.num_workers if worker else 1
        return pack(self._trees(rng, num_workers), self._config.micro_rows, self._config.row_tokens)

    def _trees(self, rng: Random, num_workers: int) -> Iterator[Tree]:
        """Each worker takes the others to have made as many tokens as itself."""
        num_tokens = 0
        while True:
            tree = self._encoder.tree(self._composer.context(rng, num_tokens * num_workers))
            num_tokens += len(tree)
            yield tree


def load_rows(composer: Composer, encoder: Encoder, config: TrainingConfig) -> Iterator[Rows]:
    """The stream, through `num_workers` forked processes."""
    stream = RowStream(composer, encoder, config)
    workers: dict[str, Any] = {}
    if config.num_workers:
        workers = {"multiprocessing_context": "fork", "prefetch_factor": 4}
    return iter(DataLoader(stream, batch_size=None, num_workers=config.num_workers, **workers))


def rows_by_kind(contexts: Sequence[Context], encoder: Encoder, config: TrainingConfig) -> dict[str, list[Rows]]:
    """Kind of question → rows of the contexts in which it is asked, with the questions of that kind alone."""
    found: dict[str, list[Rows]] = {}
    for kind in sorted({q.kind for context in contexts for q in context.questions}):
        asked = [replace(c, questions=tuple(q for q in c.questions if q.kind == kind)) for c in contexts]
        trees = [encoder.tree(context) for context in asked if context.questions]
        if rows := list(pack(trees, config.micro_rows, config.row_tokens)):  # none if all are longer than a row
            found[kind] = rows
    return found
