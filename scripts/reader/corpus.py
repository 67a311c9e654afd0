"""All that training contexts are made from: passages with facts, links, human questions, and who resembles whom.

Knows nothing about tokens or models. Invariant: nothing changes after it is built, so that workers can share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scripts.reader.asking import DESCRIPTIONS, OF_A_PERSON
from scripts.reader.facts import find_links, with_facts
from scripts.reader.passages import HumanQuestion, Link, Passage

MIN_FACTS_OF_A_TARGET, MAX_NAME_LETTERS = 2, 32


@dataclass(frozen=True)
class Corpus:
    """`neighbours`: for each passage the places of those most like it by their words, nearest first."""

    passages: tuple[Passage, ...]
    human: tuple[HumanQuestion, ...]
    links: tuple[Link, ...]
    neighbours: npt.NDArray[np.int32]
    with_facts: tuple[int, ...]
    sources: tuple[int, ...]  # passages that name a person a counterfactual may replace
    people: tuple[int, ...]  # passages of persons that such a copy may name instead
    places: dict[str, int]  # text → place in `passages`


def build_corpus(passages: Sequence[Passage], human: Sequence[HumanQuestion], num_neighbours: int = 16) -> Corpus:
    """Finds facts, links and neighbours; the human questions' own passages join the corpus."""
    texts = {p.text: p for p in [*passages, *(g for q in human for g in q.gold)]}
    pool = tuple(with_facts(p) for p in texts.values())
    factual = tuple(i for i, p in enumerate(pool) if p.facts)
    return Corpus(
        passages=pool,
        human=tuple(human),
        links=tuple(find_links(pool)),
        neighbours=nearest([f"{p.title} {p.text}" for p in pool], num_neighbours),
        with_facts=factual,
        sources=tuple(i for i in factual if any(r in pool[i].facts for r in DESCRIPTIONS)),
        people=tuple(i for i in factual if _may_be_a_target(pool[i])),
        places={p.text: i for i, p in enumerate(pool)},
    )


def _may_be_a_target(passage: Passage) -> bool:
    num_facts = sum(attribute in OF_A_PERSON for attribute in passage.facts)
    name = passage.name
    return (
        passage.kind == "person"
        and num_facts >= MIN_FACTS_OF_A_TARGET
        and " " in name
        and len(name) <= MAX_NAME_LETTERS
    )


def nearest(texts: Sequence[str], num: int, rows: int = 1024) -> npt.NDArray[np.int32]:
    """For each text the places of the `num` others with the highest TF-IDF cosine; [texts, min(num, texts - 1)]."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(sublinear_tf=True, stop_words="english", max_df=0.1 if len(texts) > 100 else 1.0)
    matrix = vectors.fit_transform(texts)
    num, found = min(num, len(texts) - 1), []
    for start in range(0, len(texts), rows):
        scores = (matrix[start : start + rows] @ matrix.T).toarray()
        scores[np.arange(len(scores)), start + np.arange(len(scores))] = -1  # not itself
        best = np.argpartition(-scores, num - 1, axis=1)[:, :num]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        found.append(np.take_along_axis(best, order, axis=1).astype(np.int32))
    return np.concatenate(found)
