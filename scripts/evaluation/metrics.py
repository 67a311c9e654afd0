"""Metrics as the field defines them: answers (SQuAD), next-token distributions, bootstrap intervals.

Knows nothing about datasets or methods. torch is imported only by `kl_to_full`, which takes logits.
Invariant: every function is pure; the same input and seed give the same number.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

MIN_GAP_POINTS = 0.5  # below it, a share of the gap between full prefill and full reuse is noise

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Interval:
    """A mean and the 95 % percentile-bootstrap interval around it, in the unit of the values."""

    mean: float
    low: float
    high: float


def normalize_answer(text: str) -> str:
    """SQuAD's rule: lower case, without ASCII punctuation, without articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def f1_score(prediction: str, answers: Sequence[str]) -> float:
    """Token F1 in [0, 1] after normalisation, the maximum over the gold `answers` (at least one)."""
    return _best(_token_f1, prediction, answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised gold answer (of at least one), else 0.0."""
    return _best(lambda tokens, gold: float(tokens == gold), prediction, answers)


def normalized_f1(f1: float, f1_reuse: float, f1_full: float) -> float | None:
    """Share of the gap between full reuse (0) and full prefill (1) that `f1` closes; all three in percent points.

    None when full prefill is not at least `MIN_GAP_POINTS` above full reuse: the share would explode.
    """
    gap = f1_full - f1_reuse
    return None if gap < MIN_GAP_POINTS else (f1 - f1_reuse) / gap


def kl_to_full(full_logits: torch.Tensor, logits: torch.Tensor) -> float:
    """KL(full ‖ other) in nats between two next-token distributions, computed in fp64.

    `full_logits`, `logits`: [V], any float dtype, finite or -inf (a masked token).
    Raises ValueError if the shapes differ or either is not a distribution.
    """
    import torch

    if full_logits.ndim != 1 or full_logits.shape != logits.shape:
        raise ValueError(f"logits must both be [V], got {list(full_logits.shape)} and {list(logits.shape)}")
    log_p = torch.log_softmax(full_logits.detach().cpu().double(), dim=0)  # [V]; to the CPU: not every device has fp64
    log_q = torch.log_softmax(logits.detach().cpu().double(), dim=0)  # [V]
    if log_p.isnan().any() or log_q.isnan().any():
        raise ValueError("logits are no distribution: they hold NaN or +inf, or all are -inf")
    seen = log_p > -torch.inf  # a token that full prefill excludes adds nothing, whatever the other gives it
    divergence = (log_p[seen].exp() * (log_p[seen] - log_q[seen])).sum()
    return max(0.0, float(divergence))  # rounding may leave equal distributions at -1e-17


def bootstrap_mean(values: npt.ArrayLike, num_draws: int = 2000, seed: int = 0) -> Interval:
    """Mean of `values` [n] with its 95 % interval over `num_draws` resamples of the n questions.

    Raises ValueError if there are no values or any is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"values must be [n] with n >= 1, got shape {list(sample.shape)}")
    if not np.isfinite(sample).all():
        raise ValueError(f"values must be finite, but value {int(np.argmin(np.isfinite(sample)))} is not")
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    picks = np.random.default_rng(seed).integers(sample.size, size=(num_draws, sample.size))
    low, high = np.percentile(sample[picks].mean(axis=1), [2.5, 97.5])
    return Interval(float(sample.mean()), float(low), float(high))


def paired_bootstrap(a: npt.ArrayLike, b: npt.ArrayLike, num_draws: int = 2000, seed: int = 0) -> Interval:
    """Mean of `a - b` with its 95 % interval; `a` and `b`: [n], values of the same n questions in the same order.

    Raises ValueError if the lengths differ, there are no values, or any is not finite.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"a and b must be of the same questions, got shapes {list(left.shape)}, {list(right.shape)}")
    return bootstrap_mean(left - right, num_draws, seed)


def bootstrap_ratio(a: npt.ArrayLike, b: npt.ArrayLike, num_draws: int = 2000, seed: int = 0) -> Interval:
    """Mean of `a` over mean of `b`, with its 95 % interval; `a` and `b`: [n], values of the same n questions.

    1 where all of `b` is 0 in a resample: there is nothing to lose. Raises ValueError if the lengths differ.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.ndim != 1 or left.size == 0 or left.shape != right.shape:
        raise ValueError(f"a and b must be of the same questions, got shapes {list(left.shape)}, {list(right.shape)}")
    picks = np.random.default_rng(seed).integers(left.size, size=(num_draws, left.size))
    tops, bottoms = left[picks].mean(axis=1), right[picks].mean(axis=1)
    low, high = np.percentile(np.divide(tops, bottoms, out=np.ones_like(tops), where=bottoms > 0), [2.5, 97.5])
    return Interval(float(left.mean() / right.mean()) if right.any() else 1.0, float(low), float(high))


def _token_f1(tokens: list[str], gold: list[str]) -> float:
    if not tokens or not gold:  # SQuAD 2.0's rule: nothing left equals only nothing left
        return float(tokens == gold)
    num_common = sum((Counter(tokens) & Counter(gold)).values())
    return 2 * num_common / (len(tokens) + len(gold))


def _best(score: Callable[[list[str], list[str]], float], prediction: str, answers: Sequence[str]) -> float:
    if isinstance(answers, str) or not answers:  # a bare string would silently be scored letter by letter
        raise ValueError(f"answers must be a sequence of at least one gold answer, got {answers!r}")
    tokens = normalize_answer(prediction).split()
    return max(score(tokens, normalize_answer(gold).split()) for gold in answers)
