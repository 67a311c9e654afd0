"""Question and passages → how well each answers it, by any sentence-transformers CrossEncoder.

Knows nothing about collections or how the passages were found. `sentence_transformers` is imported when a `Reranker` is
made, not before.

Invariant: no passage is truncated. One longer than the model's window is read in windows, and its score is the best of
theirs.
"""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from index.embedding import quiet_loading
from index.errors import RerankModelError

_BATCH_SIZE = 16
_UNLIMITED = 1 << 20  # tokenizers without a limit report an astronomic one
_FALLBACK_WINDOW = 512


class Reranker:
    """A loaded cross-encoder. Safe to use from several threads.

    Raises RerankModelError where the model is missing, cannot be loaded, or gives no single score.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        """name: a local directory or a hub id; device: as `EmbeddingConfig.embedding_device`."""
        self._name = name
        self._model = _load(name, device)
        if self._model.num_labels != 1:
            raise RerankModelError(
                f"{name}: gives {self._model.num_labels} values for a passage where one score is needed; "
                "name a cross-encoder that was trained to rank"
            )
        self._tokenizer = self._model.tokenizer
        if not self._tokenizer.is_fast:
            raise RerankModelError(f"{name}: its tokenizer gives no character offsets; a tokenizer.json is needed")
        limit = getattr(self._model, "max_seq_length", None) or self._tokenizer.model_max_length
        self._window_tokens = int(limit) if limit < _UNLIMITED else _FALLBACK_WINDOW
        self._lock = threading.Lock()  # a tokenizer cannot be used by two threads at a time
        self.scores("warm up", ["A passage."])  # loads what is loaded on first use now

    @property
    def name(self) -> str:
        """As it was given."""
        return self._name

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """How well each text answers the question: the model's logit through a sigmoid, in [0, 1]."""
        with self._lock:
            windows = [(i, window) for i, text in enumerate(texts) for window in self._windows(question, text)]
            found = self._model.predict(  # of no pairs, no scores
                [(question, window) for _, window in windows],
                batch_size=_BATCH_SIZE,
                activation_fn=lambda logits: logits.sigmoid(),  # models differ in what they do by themselves
                show_progress_bar=False,
            )
        best = [0.0] * len(texts)
        for (i, _), score in zip(windows, found, strict=True):
            best[i] = max(best[i], float(score))
        return best

    def _windows(self, question: str, text: str) -> Iterator[str]:
        """The text in parts that fit beside the question, which itself takes half of the window at most."""
        taken = int(self._tokenizer.num_special_tokens_to_add(pair=True)) + len(self._offsets(question))
        room = max(self._window_tokens - taken, self._window_tokens // 2, 1)
        offsets = self._offsets(text)
        starts = [0, *(offsets[i][0] for i in range(room, len(offsets), room)), len(text)]
        yield from (text[begin:end] for begin, end in itertools.pairwise(starts))

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        spans = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets: list[tuple[int, int]] = spans["offset_mapping"]
        return offsets


def _load(name: str, device: str) -> Any:
    try:
        sentence_transformers = importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise RerankModelError(f"sentence-transformers cannot be imported ({error}); pip install it") from error
    try:
        with quiet_loading():
            return sentence_transformers.CrossEncoder(name, device=None if device == "auto" else device)
    except Exception as error:  # the loader raises whatever its parts raise
        raise RerankModelError(
            f"re-ranking model {name!r} cannot be loaded on {device!r}: {error}; "
            "name a local directory or a hub id of a sentence-transformers CrossEncoder, or '' for none"
        ) from error
