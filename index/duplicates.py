"""Telling a passage that repeats a better one. Knows nothing about where passages come from."""

from __future__ import annotations

import re

import numpy as np

from index.types import FloatArray

_NUMBER = re.compile(r"\d+")


class Kept:
    """The vectors and numbers of the passages kept so far.

    Embeddings hardly see numbers, and two records or revisions of a text may differ in nothing else: passages with
    different numbers are no duplicates.
    """

    def __init__(self, max_similarity: float) -> None:
        self._limit = max_similarity
        self._vectors: list[FloatArray] = []
        self._numbers: list[list[str]] = []

    def repeats(self, text: str, vector: FloatArray | None) -> bool:
        """Whether a passage kept says the same; if not, this one is kept too. vector: float32 [dim], unit length."""
        if vector is None:
            return False
        numbers = sorted(_NUMBER.findall(text))
        if self._vectors:
            similar = np.flatnonzero(np.stack(self._vectors) @ vector >= self._limit)
            if any(numbers == self._numbers[i] for i in similar):
                return True
        self._vectors.append(vector)
        self._numbers.append(numbers)
        return False
