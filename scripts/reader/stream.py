"""An endless stream of packed rows, made by worker processes while the accelerator is busy.

Invariant: a seed and a number of workers give the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from scripts.reader.branches import Rows, Tree, pack
from scripts.reader.config import TrainingConfig
from scripts.reader.contexts import Composer
from scripts.reader.encoding import Encoder


class RowStream(IterableDataset[Rows]):
    """Contexts, composed and encoded one after the other, packed."""

    def __init__(self, composer: Composer, encoder: Encoder, config: TrainingConfig) -> None:
        self._composer, self._encoder, self._config = composer, encoder, config

    def __iter__(self) -> Iterator[Rows]:
        worker = get_worker_info()
        rng = Random(f"{self._config.seed}:{worker.id if worker else 0}")
        return pack(self._trees(rng), self._config.micro_rows, self._config.row_tokens)

    def _trees(self, rng: Random) -> Iterator[Tree]:
        while True:
            yield self._encoder.tree(self._composer.compose(rng))


def load_rows(composer: Composer, encoder: Encoder, config: TrainingConfig) -> Iterator[Rows]:
    """The stream, through `num_workers` forked processes."""
    stream = RowStream(composer, encoder, config)
    workers: dict[str, Any] = {}
    if config.num_workers:
        workers = {"multiprocessing_context": "fork", "prefetch_factor": 4}
    return iter(DataLoader(stream, batch_size=None, num_workers=config.num_workers, **workers))
