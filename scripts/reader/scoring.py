"""How well a reader answers evaluation questions by full prefill: batched, greedy, SQuAD F1 by kind of question.

Knows nothing about training. Invariant: the prompt is the server's; F1 is what `fusionrag evaluate` calls `full`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scripts.evaluation.datasets import Example
from scripts.evaluation.metrics import Interval, exact_match, f1_score, paired_bootstrap
from scripts.reader.branches import Tree, dense_mask, pack
from scripts.reader.contexts import Context
from scripts.reader.encoding import Encoder

MAX_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Answered:
    """One question with what the model said."""

    example: Example
    answer: str
    f1: float
    exact: float


@torch.inference_mode()
def answer_all(
    model: Any, tokenizer: Any, examples: Sequence[Example], max_batch_tokens: int = 65536
) -> list[Answered]:
    """In the order of `examples`."""
    encoder = Encoder(tokenizer)
    prompts = [
        encoder.context_ids([(p.title, p.text) for p in e.passages]) + encoder.question_ids(e.question)
        for e in examples
    ]
    texts: dict[int, str] = {}
    for batch in _batches(prompts, max_batch_tokens):
        longest = max(len(prompts[i]) for i in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        seen = torch.zeros_like(ids)
        for row, i in enumerate(batch):  # padded on the left: all prompts end, and all answers begin, together
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            seen[row, longest - len(prompts[i]) :] = 1
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=seen.to(model.device),
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        said = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        texts.update(zip(batch, (text.strip() for text in said), strict=True))
    return [
        Answered(e, texts[i], f1_score(texts[i], e.answers), exact_match(texts[i], e.answers))
        for i, e in enumerate(examples)
    ]


def predicted_by_kind(model: Any, tokenizer: Any, contexts: Sequence[Context]) -> dict[str, tuple[int, float]]:
    """Kind of question → number, and percent of the answers that are `predicted`.

    Of contexts that were not trained on: tells what was learned from what is known by heart, kind by kind.
    """
    encoder, found = Encoder(tokenizer), defaultdict(list)
    for context in contexts:
        for question, right in zip(context.questions, predicted(model, encoder.tree(context)), strict=True):
            found[question.kind].append(float(right))
    return {kind: (len(values), 100 * _mean(values)) for kind, values in sorted(found.items())}


@torch.inference_mode()
def predicted(model: Any, tree: Tree) -> list[bool]:
    """For each branch, whether every token of its answer is the most likely one, given those before."""
    rows = next(pack([tree], 1, len(tree))).to(model.device)
    hidden = model.model(
        input_ids=rows.ids, attention_mask=dense_mask(rows), position_ids=rows.positions, use_cache=False
    ).last_hidden_state
    right = model.lm_head(hidden[0, rows.predictors]).argmax(-1) == rows.targets
    return [bool(tokens.all()) for tokens in right.split([len(branch.answer_ids) for branch in tree.branches])]


def _batches(prompts: Sequence[tuple[int, ...]], max_batch_tokens: int) -> Iterator[list[int]]:
    """Prompts of like length together, at most that many tokens with their padding."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if batch and (len(batch) + 1) * len(prompts[i]) > max_batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def by_type(answered: Sequence[Answered]) -> dict[str, tuple[int, float, float]]:
    """Kind of question → (number, mean F1, mean exact match) in percent points; 'all' first."""
    return {
        name: (len(items), 100 * _mean([i.f1 for i in items]), 100 * _mean([i.exact for i in items]))
        for name, items in _grouped(answered).items()
    }


def differences(new: Sequence[Answered], old: Sequence[Answered]) -> dict[str, Interval]:
    """Kind of question → F1 of `new` minus that of `old` on the same questions, in points, with its interval."""
    before = _grouped(old)
    return {
        name: paired_bootstrap([100 * i.f1 for i in items], [100 * i.f1 for i in before[name]])
        for name, items in _grouped(new).items()
    }


def _grouped(answered: Sequence[Answered]) -> dict[str, list[Answered]]:
    groups: dict[str, list[Answered]] = defaultdict(list)
    for item in answered:
        groups["all"].append(item)
        groups[group_of(item.example.type)].append(item)
    return groups


def group_of(example_type: str) -> str:
    """'bridge_director_birth' is of the group 'bridge'; types that begin with 'real_' keep their second word."""
    words = example_type.split("_")
    return "_".join(words[:2]) if words[0] == "real" else words[0] or "untyped"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
