"""From logits to a token, and from tokens to text that may be sent.

The processors are those of transformers (temperature, top-k, top-p, min-p, repetition penalty); ours is only what they
lack: validation that names the field, a generator per request, and text that streams without ever showing half a
character or the beginning of a stop string.

Knows nothing of requests, batches or the model. Invariants: what a Sampler draws depends on its own params, prompt and
logits alone; the pieces of a TextStream, put together, are the text of all its tokens up to the stop.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusionrag.errors import InvalidSampling

MAX_STOP_STRINGS = 16

_GREEDY_BELOW = 1e-5  # a smaller temperature divides logits into infinity, and is greedy for every purpose


@dataclass(frozen=True)
class SamplingParams:
    """How the answer is drawn. `temperature` 0 is greedy. Raises InvalidSampling naming the field."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # same seed, same prompt, same answer – whatever else runs beside it
    stop: tuple[str, ...] = ()
    max_tokens: int = 128
    ignore_eos: bool = False  # benchmarks only

    def __post_init__(self) -> None:
        # Each condition is false for NaN.
        self._require(0 <= self.temperature <= 2, "temperature", "must lie in [0, 2]")
        self._require(0 < self.top_p <= 1, "top_p", "must lie in (0, 1]")
        self._require(self.top_k >= 0, "top_k", "must be 0 (off) or positive")
        self._require(0 <= self.min_p <= 1, "min_p", "must lie in [0, 1]")
        self._require(0.01 <= self.repetition_penalty <= 10, "repetition_penalty", "must lie in [0.01, 10]")
        self._require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "must fit in 64 bits")
        self._require(not isinstance(self.stop, str), "stop", "must be a tuple of strings, not one string")
        self._require(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
        self._require(all(self.stop), "stop", "must not hold an empty string")
        self._require(self.max_tokens >= 1, "max_tokens", "must be at least 1")

    def _require(self, condition: bool, field: str, message: str) -> None:
        if not condition:
            raise InvalidSampling(f"{field}: {message}, got {getattr(self, field)!r}", field=field)

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW


class Sampler:
    """Draws the tokens of one request. `prompt_ids` count as seen for the repetition penalty, as in transformers.

    Its generator is its own, on the CPU: other requests, other devices and the global generator do not change what it
    draws. Without a seed it starts from entropy of the operating system.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._greedy = params.greedy
        self._processors = _processors(params)
        self._penalised = params.repetition_penalty != 1
        seen = sorted(set(prompt_ids)) if self._penalised else []
        self._seen = torch.tensor([seen], dtype=torch.int64)  # (1, distinct ids)
        self._seed = params.seed

    @cached_property
    def _generator(self) -> torch.Generator:
        """Made when something is drawn, which greedy sampling does not do."""
        generator = torch.Generator()
        if self._seed is None:
            generator.seed()
        else:
            generator.manual_seed(self._seed)
        return generator

    @torch.inference_mode()
    def next(self, logits: torch.Tensor) -> int:
        """logits (V,), any float dtype, any device; not changed."""
        if self._greedy and not self._penalised:
            return int(logits.argmax())
        scores = logits[None].to("cpu", torch.float32)
        scores = self._processors(self._seen, scores)  # type: ignore[arg-type]  # typed as a legacy LongTensor
        token_id = int(scores.argmax() if self._greedy else self._draw(scores[0]))
        if self._penalised and not (self._seen == token_id).any():
            self._seen = torch.cat((self._seen, torch.tensor([[token_id]])), dim=1)
        return token_id

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=self._generator)


def _processors(params: SamplingParams) -> LogitsProcessorList:
    """Those that do something, in the order in which transformers applies them."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.greedy:
        return processors
    if params.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors


@dataclass(frozen=True)
class StreamStep:
    """`text` may be sent (it may be ''). `finished` is 'stop' with the last piece of an answer that ended by itself."""

    text: str
    finished: Literal["stop"] | None = None


class TextStream:
    """Turns tokens into text that may be sent, one token at a time. Special tokens have no text.

    Held back: bytes that are not yet a whole character, and an ending that may be the beginning of a stop string. Of
    several stop strings the one that is complete first ends the answer; it is never shown. `eos_ids` end it too (pass
    none to ignore them). After 'stop' nothing more may be pushed.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), eos_ids: Collection[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._eos_ids = frozenset(eos_ids)
        # Only a window is decoded: the tokens that gave the last piece of text, because a tokenizer may write a token
        # otherwise at the beginning of a text than behind another one, and the tokens that have given none yet.
        self._window: list[int] = []
        self._num_read = 0  # tokens of the window whose text has been read
        self._num_read_chars = 0
        self._held = ""  # read, but perhaps the beginning of a stop string

    def push(self, token_id: int) -> StreamStep:
        """The text that became certain with this token."""
        if token_id in self._eos_ids:
            return StreamStep(self.flush(), "stop")
        self._window.append(token_id)
        return self._release(self._read(last=False), last=False)

    def flush(self) -> str:
        """What is still held back: call it when the answer ends for another reason than 'stop'."""
        return self._release(self._read(last=True), last=True).text

    def _read(self, last: bool) -> str:
        """The text of the unread tokens; '' while it ends in the middle of a character, unless it is the last."""
        text = self._decode(self._window)
        fresh = text[self._num_read_chars :]
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        if not fresh:
            if self._num_read:  # special tokens behind a text: a long run of them must not make the window long
                del self._window[self._num_read :]
            return ""
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        self._num_read_chars = len(self._decode(self._window))
        return fresh

    def _release(self, fresh: str, last: bool) -> StreamStep:
        """Takes from the held text and `fresh` what cannot become part of a stop string."""
        text = self._held + fresh
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return StreamStep(text[: min(found)[1]], "stop")
        num_held = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return StreamStep(text[: len(text) - num_held])

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list only for a list of lists
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest ending of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
