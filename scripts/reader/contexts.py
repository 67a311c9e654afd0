"""Training contexts: some passages, as retrieval would bring them, and many questions about them.

Knows nothing about tokens but how many a text makes, roughly. Invariants: no two passages with facts share a name, so
that a question means one of them; the same random state gives the same context.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from scripts.reader.asking import DESCRIPTIONS, ask_bridge, ask_fact
from scripts.reader.comparisons import compare
from scripts.reader.config import ContextConfig
from scripts.reader.corpus import Corpus
from scripts.reader.drills import ATTRIBUTES, NUM_PASSAGES, SHORTENED_SHARE, ask_steps, pick_attribute, shortened
from scripts.reader.natural import ask_sentence
from scripts.reader.passages import Link, Passage, Question
from scripts.reader.rewrite import (
    in_other_years,
    latest_year,
    offset_to,
    substitutes,
    with_other_answer,
    with_person,
)

LETTERS_PER_TOKEN = 4.1
TOKENS_BESIDE_TEXT = 4
LENGTHS = ((250, 700, 0.25), (700, 1400, 0.3), (1400, 2200, 0.27), (2200, 3600, 0.1), (3600, 5000, 0.08))
_PUNCTUATION = re.compile(r"([,.;:()'\"])")


@dataclass(frozen=True)
class Context:
    """Passages in prompt order, and the questions that are asked of them one by one."""

    passages: tuple[Passage, ...]
    questions: tuple[Question, ...]


@dataclass
class Scene:
    """A context while it is being put together."""

    room: float
    passages: list[Passage] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    used: set[int] = field(default_factory=set)  # places in the corpus

    def add(self, *passages: Passage) -> bool:
        """All of them or none: none may be ambiguous beside what is there, and they must fit."""
        names = [p.name.lower() for p in passages if p.facts]
        cost = sum(num_tokens(p) for p in passages)
        if cost > self.room or len(set(names)) < len(names) or not self.names.isdisjoint(names):
            return False
        self.passages += [p for p in passages if p not in self.passages]
        self.names.update(names)
        self.room -= cost
        return True


def num_tokens(passage: Passage) -> float:
    return (len(passage.title) + len(passage.text)) / LETTERS_PER_TOKEN + TOKENS_BESIDE_TEXT


class Composer:
    """Makes contexts from a corpus, without end."""

    def __init__(self, corpus: Corpus, config: ContextConfig) -> None:
        self._corpus, self._config = corpus, config
        self._substitutes = substitutes(corpus.human, [corpus.passages[i].name for i in corpus.people])
        factual = [corpus.passages[i] for i in corpus.with_facts]
        self._years = [year for passage in factual if (year := latest_year(passage))]
        self._dated = {attribute: [p for p in factual if attribute in p.facts] for attribute in ATTRIBUTES}

    def context(self, rng: Random, num_tokens_before: float = 0.0) -> Context:
        """A drill or not: the fewer, the more tokens were made before."""
        c = self._config
        done = min(1.0, num_tokens_before / c.drill_tokens)
        share = c.first_drill_share + done * (c.drill_share - c.first_drill_share)
        drill = self.drill(rng) if rng.random() < share else None
        return drill or self.compose(rng)

    def drill(self, rng: Random) -> Context | None:
        """A short context for comparing dates; None where the corpus has too few of the sort that was drawn."""
        attribute = pick_attribute(rng)
        dated = self._dated[attribute]
        scene = Scene(room=float("inf"))
        for passage in rng.sample(dated, min(len(dated), rng.choice(NUM_PASSAGES))):
            moved = self._maybe_moved(passage, rng)
            scene.add(shortened(moved, attribute) if rng.random() < SHORTENED_SHARE else moved)
        questions = ask_steps(scene.passages, attribute, rng) if len(scene.passages) > 1 else []
        return Context(tuple(scene.passages), tuple(questions)) if questions else None

    def compose(self, rng: Random) -> Context:
        """A context as retrieval would bring it, with at least one question."""
        while True:
            low, high, _ = rng.choices(LENGTHS, [weight for *_, weight in LENGTHS])[0]
            length = rng.uniform(low, high)
            scene = Scene(length)
            self._add_human(scene, rng)
            for _ in range(1 + int(length > 600) + int(length > 1000) + int(length > 1800)):
                self._add_link(scene, rng)
            self._fill(scene, rng)
            self._ask(scene, rng, round(min(self._config.max_questions, 3 + length / 160)))
            if scene.questions:
                rng.shuffle(scene.passages)
                context = Context(tuple(scene.passages), tuple(scene.questions))
                return as_plain(context) if rng.random() < self._config.plain_share else context

    def _add_human(self, scene: Scene, rng: Random) -> None:
        wanted = self._config.human_per_context if self._corpus.human else 0.0
        for _ in range(int(wanted) + int(rng.random() < wanted % 1)):
            question = asked = rng.choice(self._corpus.human)
            if rng.random() < self._config.counterfactual_share:
                asked = with_other_answer(question, self._substitutes, rng)
            if scene.add(*asked.gold):
                scene.used.update(self._corpus.places[p.text] for p in question.gold)
                answer = asked.answers[0] if rng.random() < 0.8 else rng.choice(asked.answers)
                scene.questions.append(Question(asked.text, answer, "human"))

    def _add_link(self, scene: Scene, rng: Random) -> None:
        """A real pair of linked passages, or a copy that names somebody else, whose passage comes along."""
        corpus = self._corpus
        if corpus.links and rng.random() > self._config.counterfactual_share:
            link = rng.choice(corpus.links)
            source, relation, target = link.source, link.relation, link.target
        elif corpus.sources and corpus.people:
            source = corpus.passages[rng.choice(corpus.sources)]
            target = corpus.passages[rng.choice(corpus.people)]
            relation = rng.choice([r for r in DESCRIPTIONS if r in source.facts])
            if target.name.lower() == source.name.lower():
                return
        else:
            return
        scene.used.update(corpus.places[p.text] for p in (source, target))
        source, target = self._maybe_moved(source, rng), self._maybe_moved(target, rng)
        if source.facts[relation] != target.name:
            source = with_person(source, relation, target.name)
        if scene.add(source, target):
            scene.links.append(Link(source, relation, target))

    def _maybe_moved(self, passage: Passage, rng: Random) -> Passage:
        if not self._years or rng.random() >= self._config.year_share:
            return passage
        return in_other_years(passage, offset_to(passage, rng.choice(self._years)))

    def _fill(self, scene: Scene, rng: Random) -> None:
        """Distractors: what resembles the passages that are there, and others; those with facts can be asked about."""
        corpus = self._corpus
        near = [int(i) for place in sorted(scene.used) for i in rng.sample(list(corpus.neighbours[place]), 3)]
        rng.shuffle(near)
        for _ in range(200):
            if scene.room < 40:
                return
            if near and rng.random() < 0.6:
                place = near.pop()
            else:
                place = rng.choice(corpus.with_facts) if rng.random() < 0.6 else rng.randrange(len(corpus.passages))
            if place not in scene.used and scene.add(self._maybe_moved(corpus.passages[place], rng)):
                scene.used.add(place)

    def _ask(self, scene: Scene, rng: Random, num_questions: int) -> None:
        c = self._config
        kinds: tuple[tuple[float, Callable[[], Question | None]], ...] = (
            (c.bridge_share if scene.links else 0.0, lambda: ask_bridge(rng.choice(scene.links), rng)),
            (c.comparison_share, lambda: compare(scene.passages, scene.links, rng)),
            (c.fact_share, lambda: ask_fact(rng.choice(scene.passages), rng)),
            (c.sentence_share, lambda: ask_sentence(rng.choice(scene.passages), rng)),
        )
        asked = {q.text for q in scene.questions}
        for ask in rng.choices([ask for _, ask in kinds], [weight for weight, _ in kinds], k=2 * num_questions):
            question = ask()
            if question and question.text not in asked and len(scene.questions) < num_questions:
                asked.add(question.text)
                scene.questions.append(question)


def as_plain(context: Context) -> Context:
    """Lower case, no titles, punctuation set apart: how some corpora are published."""

    def plain(text: str) -> str:
        return " ".join(_PUNCTUATION.sub(r" \1 ", text).lower().split())

    passages = tuple(Passage("", plain(f"{p.title} . {p.text}")) for p in context.passages)
    return Context(passages, tuple(replace(q, answer=plain(q.answer)) for q in context.questions))
