"""Contexts as token ids, in the very prompt that the server builds: its own `PromptBuilder` spells every piece.

Invariant: context and branch, together, are the prompt that the server would send for that question, and the answer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fusionrag.config import PromptConfig
from fusionrag.prompt import PromptBuilder, Turn
from scripts.reader.branches import Branch, Tree
from scripts.reader.contexts import Context

MAX_CACHED_PASSAGES = 32768


class Encoder:
    """Spells contexts with one tokenizer. Not shared between threads."""

    def __init__(self, tokenizer: Any, config: PromptConfig | None = None) -> None:
        self._tokenizer = tokenizer
        self._prompts = PromptBuilder(tokenizer, config or PromptConfig())
        self._passage = lru_cache(MAX_CACHED_PASSAGES)(self._prompts.encode)

    @property
    def end_id(self) -> int:
        """What ends an answer."""
        return self._prompts.end_of_turn_id

    def tree(self, context: Context) -> Tree:
        """The context's tokens, and a branch for each of its questions."""
        ids = self.context_ids([(p.title, p.text) for p in context.passages])
        return Tree(ids, tuple(Branch(self.question_ids(q.text), self.answer_ids(q.answer)) for q in context.questions))

    def context_ids(self, passages: list[tuple[str, str]]) -> tuple[int, ...]:
        """Of (title, text) pairs, each tokenised alone behind the prefix."""
        return tuple(
            self._prompts.prefix_ids + tuple(i for title, text in passages for i in self._passage(title, text))
        )

    def question_ids(self, question: str) -> tuple[int, ...]:
        """From behind the passages to where the answer begins."""
        return self._prompts.plan((), (Turn("user", question),)).segments[-1].token_ids

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """The answer and the end of the turn."""
        return (*self._tokenizer(answer, add_special_tokens=False)["input_ids"], self.end_id)
