"""A small corpus in an encyclopedia's wording, and the tiny model with an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.reader.adapter import add_adapter
from scripts.reader.config import TrainingConfig
from scripts.reader.corpus import Corpus, build_corpus
from scripts.reader.passages import HumanQuestion, Passage

FIRST = ("Anna", "Oskar", "Mira", "Tomas", "Elin", "Pavel", "Rosa", "Viktor")
LAST = ("Brell", "Venn", "Stahl", "Kovar", "Lund", "Marek", "Orsini", "Hale")
NATIONS = ("Swedish", "Polish", "Italian", "Swedish", "Danish", "Polish", "Italian", "Welsh")


def corpus_passages() -> list[Passage]:
    """Eight directors and a film of each."""
    found = []
    for i, (first, last, nation) in enumerate(zip(FIRST, LAST, NATIONS, strict=True)):
        name = f"{first} {last}"
        found.append(
            Passage(
                name,
                f"{name} (born {3 + i} May {1901 + 4 * i} in Kellburg) was a {nation} film director and painter. "
                f"{'She' if i % 2 == 0 else 'He'} died on {7 + i} June {1960 + 3 * i} and was buried near the mill. "
                f"{'Her' if i % 2 == 0 else 'His'} house was bought by Ada Winter.",
            )
        )
        found.append(
            Passage(
                f"The {last} Affair ({1930 + 2 * i} film)",
                f"The {last} Affair is a {1930 + 2 * i} {nation} drama film directed by {name} and starring Lea Moss. "
                f"It was shot in Hamburg in {1929 + 2 * i} with {12 + i} boats.",
            )
        )
    return found


HUMAN = [
    HumanQuestion(
        "Who kept the lighthouse?",
        ("Jonas Reed",),
        (Passage("Lighthouse", "Jonas Reed kept the lighthouse until 1911, when it burned down."),),
    ),
    HumanQuestion(
        "When was the bridge opened?",
        ("1887",),
        (Passage("Bridge", "The bridge was opened in 1887 and repaired in 1902 after the flood."),),
    ),
    HumanQuestion(
        "How many bells are there?",
        ("42 bells",),
        (Passage("Tower", "In the tower there are 42 bells, all of them cast in one year."),),
    ),
]


@pytest.fixture(scope="session")
def passages() -> list[Passage]:
    return corpus_passages()


@pytest.fixture(scope="session")
def human() -> list[HumanQuestion]:
    return HUMAN


@pytest.fixture(scope="session")
def corpus(passages, human) -> Corpus:
    return build_corpus(passages, human, num_neighbours=6)


@pytest.fixture
def small() -> TrainingConfig:
    """Settings under which a tiny model trains in seconds on a CPU."""
    return TrainingConfig(
        rank=4, max_steps=20, rows=1, micro_rows=1, row_tokens=4096, num_workers=0, learning_rate=1e-2, warmup=0.1
    )


@pytest.fixture
def make_peft(make_config, make_hf, small) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        """A tiny Llama with an adapter; `changes` of the model's configuration."""
        return add_adapter(make_hf(make_config("llama", max_position_embeddings=4096, **changes), "sdpa"), small)

    return make


@pytest.fixture
def files(tmp_path, passages, human) -> dict[str, Path]:
    """The corpus as the files that the command reads, and an evaluation file about a held-out passage."""
    held_out = {
        "title": "Quay",
        "text": "The quay at Sennet was built by Ada Winter in 1871 for the herring boats of the northern towns.",
    }
    contents = {
        "passages": [{"title": p.title, "text": p.text} for p in passages] + [held_out],
        "human": [
            {"question": q.text, "answers": q.answers, "gold": [{"title": p.title, "text": p.text} for p in q.gold]}
            for q in human
        ],
        "evaluation": [
            {"question": "Who built it?", "answers": ["Ada Winter"], "type": "single", "gold": [0], "ctxs": [held_out]}
        ],
    }
    paths = {name: tmp_path / f"{name}.json" for name in contents}
    for name, content in contents.items():
        paths[name].write_text(json.dumps(content), encoding="utf-8")
    return paths
