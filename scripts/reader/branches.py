"""Contexts with their questions as branches, packed into rows of one length, and who may attend to whom.

A context's tokens come first in its stretch of a row; behind them each question with its answer is a branch, whose
positions go on where the context ends, as if the other branches were not there. So a context is run once for all its
questions, and every branch gets exactly what a prompt of its own would get.

Knows nothing about what the tokens mean. Invariants: a token attends to earlier tokens of its own context and of its
own branch, and to nothing else; every row is exactly `row_tokens` long.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

CONTEXT = -1  # the branch of what all branches share


@dataclass(frozen=True)
class Branch:
    """A question's tokens and those of its answer, the end of turn included."""

    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.question_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Tree:
    """A context's tokens and the branches that hang off them."""

    context_ids: tuple[int, ...]
    branches: tuple[Branch, ...]

    def __len__(self) -> int:
        return len(self.context_ids) + sum(len(branch) for branch in self.branches)


@dataclass(frozen=True)
class Rows:
    """Packed rows. ids, positions, documents, branches: (B, S).

    Of the answers' tokens, (N,): predictors (flat place), targets, weights, answers (which answer a token is of).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor
    branches: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    answers: torch.Tensor

    def to(self, device: torch.device) -> Rows:
        return Rows(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


@dataclass
class _Row:
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    predictors: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of the answers

    def add(self, tree: Tree, document: int) -> None:
        length = len(tree.context_ids)
        self._extend(tree.context_ids, 0, document, CONTEXT)
        for number, branch in enumerate(tree.branches):
            first = len(self.ids) + len(branch.question_ids)
            self._extend(branch.question_ids + branch.answer_ids, length, document, number)
            self.predictors += range(first - 1, first - 1 + len(branch.answer_ids))
            self.targets += branch.answer_ids
            self.lengths.append(len(branch.answer_ids))
            self.weights += [len(branch.answer_ids) ** -0.5] * len(branch.answer_ids)  # short answers count, long too

    def _extend(self, ids: Sequence[int], position: int, document: int, branch: int) -> None:
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.documents += [document] * len(ids)
        self.branches += [branch] * len(ids)


def pack(trees: Iterable[Tree], num_rows: int, row_tokens: int) -> Iterator[Rows]:
    """Batches of `num_rows` rows. A tree longer than a row is left out; one that finds no room comes a batch later."""
    waiting: list[Tree] = []
    for tree in trees:
        if len(tree) <= row_tokens:
            waiting.append(tree)
        if sum(map(len, waiting)) >= num_rows * row_tokens:
            rows, waiting = _fill(waiting, num_rows, row_tokens)
            yield rows
    while waiting:
        rows, waiting = _fill(waiting, num_rows, row_tokens)
        yield rows


def _fill(trees: Sequence[Tree], num_rows: int, row_tokens: int) -> tuple[Rows, list[Tree]]:
    """The longest first, each into the first row that has room; and those for which none has."""
    rows, left = [_Row() for _ in range(num_rows)], []
    for document, tree in enumerate(sorted(trees, key=len, reverse=True)):
        row = next((r for r in rows if len(r.ids) + len(tree) <= row_tokens), None)
        if row is None:
            left.append(tree)
        else:
            row.add(tree, document)
    return _to_rows(rows, row_tokens), left


def _to_rows(rows: Sequence[_Row], row_tokens: int) -> Rows:
    def grid(name: str, fill: int) -> torch.Tensor:
        array: npt.NDArray[np.int64] = np.full((len(rows), row_tokens), fill, np.int64)
        for i, row in enumerate(rows):
            values = getattr(row, name)
            array[i, : len(values)] = values
        return torch.from_numpy(array)

    predictors = [place + i * row_tokens for i, row in enumerate(rows) for place in row.predictors]
    lengths = torch.tensor([n for row in rows for n in row.lengths], dtype=torch.int64)
    return Rows(
        ids=grid("ids", 0),
        positions=grid("positions", 0),
        documents=grid("documents", -1),  # the padding is a document of its own
        branches=grid("branches", CONTEXT),
        predictors=torch.tensor(predictors, dtype=torch.int64),
        targets=torch.tensor([t for row in rows for t in row.targets], dtype=torch.int64),
        weights=torch.tensor([w for row in rows for w in row.weights], dtype=torch.float32),
        answers=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
    )


def dense_mask(rows: Rows) -> torch.Tensor:
    """(B, 1, S, S) bool, true where the query of dimension 2 may attend to the key of dimension 3."""
    documents, branches = rows.documents, rows.branches
    same_document = documents[:, :, None] == documents[:, None, :]
    reachable = (branches[:, None, :] == CONTEXT) | (branches[:, None, :] == branches[:, :, None])
    places = torch.arange(documents.shape[1], device=documents.device)
    return (same_document & reachable & (places[:, None] >= places[None, :]))[:, None]


def block_mask(rows: Rows) -> Any:
    """The same as `dense_mask` for flex attention, which skips the blocks in which nothing is allowed."""
    from torch.nn.attention.flex_attention import create_block_mask

    documents, branches = rows.documents, rows.branches

    def allowed(b: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        same_document = documents[b, query] == documents[b, key]
        reachable = (branches[b, key] == CONTEXT) | (branches[b, key] == branches[b, query])
        return same_document & reachable & (query >= key)

    batch, length = documents.shape
    device = documents.device
    return create_block_mask(allowed, batch, None, length, length, device=device, _compile=device.type == "cuda")
