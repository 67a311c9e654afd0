"""The training loop: packed rows in, an adapter out. Loss on the answers only.

Knows nothing about how rows are made. Invariant: one pass over a row gives the loss that one pass per question would.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from scripts.reader.adapter import parameter_groups
from scripts.reader.branches import Rows, block_mask, dense_mask
from scripts.reader.config import TrainingConfig

LOG_EVERY = 20


@dataclass(frozen=True)
class Progress:
    """One line of the log: means over the steps since the line before."""

    step: int
    seconds: float
    loss: float
    accuracy: float  # share of answer tokens whose most likely prediction is right
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float


@dataclass(frozen=True)
class Validation:
    """One line of the log: kind of question → percent of the answers set aside that are predicted from end to end."""

    step: int
    predicted: dict[str, float]


class Trainer:
    """Trains a PEFT model's adapter on rows."""

    def __init__(self, model: Any, config: TrainingConfig) -> None:
        self._model, self._config = model, config
        self._lm = model.get_base_model()
        self._device: torch.device = self._lm.device
        self._cuda = self._device.type == "cuda"
        groups = [{**group, "peak": group["lr"]} for group in parameter_groups(model, config)]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=self._cuda)
        self._trained = [p for group in groups for p in group["params"]]
        if self._cuda and config.compile:
            for layer in self._lm.model.layers:
                layer.compile(dynamic=False)

    def warm_up(self, rows: Rows) -> None:
        """Forth and back once, forgetting the gradient, so that the schedule's time does not hold the compilation."""
        self._model.train()
        self.loss(rows.to(self._device))[0].backward()  # type: ignore[no-untyped-call]
        self._optimizer.zero_grad(set_to_none=True)

    def train(
        self, rows: Iterator[Rows], log: Path | None = None, validation: Mapping[str, Sequence[Rows]] | None = None
    ) -> list[Progress]:
        """Runs the schedule to its end; every line of the log is also appended to `log` as JSON and printed."""
        self._model.train()
        history: list[Progress] = []
        recent: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque(maxlen=LOG_EVERY)
        began = last = time.perf_counter()
        for step in range(1, self._config.max_steps + 1):
            seconds = time.perf_counter() - began
            if seconds > self._config.max_seconds:
                break
            self._set_learning_rate_(max(step / self._config.max_steps, seconds / self._config.max_seconds))
            recent.append(self._step(rows))
            if step % LOG_EVERY == 0 or step == self._config.max_steps:
                loss, accuracy, norm = (float(torch.stack(values).mean()) for values in zip(*recent, strict=True))
                now = time.perf_counter()
                tokens = len(recent) * self._config.rows * self._config.row_tokens
                rate = self._optimizer.param_groups[0]["lr"]
                history.append(Progress(step, now - began, loss, accuracy, rate, norm, tokens / (now - last)))
                _write(history[-1], log)
                recent.clear()
                last = now
            if validation and step % self._config.validate_every == 0:
                shares = {kind: round(self.predicted(wanted), 1) for kind, wanted in validation.items()}
                _write(Validation(step, shares), log)
        return history

    def _set_learning_rate_(self, done: float) -> None:
        """Up linearly during the warm-up, then down linearly."""
        c = self._config
        factor = done / c.warmup if done < c.warmup else 1 - (1 - c.final) * (done - c.warmup) / (1 - c.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _step(self, rows: Iterator[Rows]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One optimizer step: (loss, accuracy, norm of the gradient)."""
        parts = self._config.rows // self._config.micro_rows
        losses, hits = [], []
        for _ in range(parts):
            loss, accuracy = self.loss(next(rows).to(self._device))
            (loss / parts).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            hits.append(accuracy)
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._config.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean(), torch.stack(hits).mean(), norm

    def loss(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted cross-entropy over the answers' tokens, and the share of them that is predicted right."""
        logits = self._logits(rows)
        losses = F.cross_entropy(logits.float(), rows.targets, reduction="none")
        accuracy = (logits.argmax(-1) == rows.targets).float().mean()
        return (losses * rows.weights).sum() / rows.weights.sum(), accuracy

    def predicted(self, validation: Sequence[Rows]) -> float:
        """Percent of the answers of which every token is the most likely one.

        Runs as training does, gradients and all: what is compiled for training serves it too.
        """
        right = []
        for rows in validation:
            rows = rows.to(self._device)
            hits = (self._logits(rows).argmax(-1) == rows.targets).float()
            right.append(torch.ones(int(rows.answers[-1]) + 1, device=self._device))
            right[-1].scatter_reduce_(0, rows.answers, hits, "amin")
        return 100 * float(torch.cat(right).mean())

    def _logits(self, rows: Rows) -> torch.Tensor:
        """What is said to come where an answer's token comes; (N, V)."""
        flex = self._lm.config._attn_implementation == "flex_attention"
        mask = block_mask(rows) if flex else dense_mask(rows)
        with torch.autocast("cuda", torch.bfloat16) if self._cuda else nullcontext():
            hidden = self._lm.model(
                input_ids=rows.ids, attention_mask=mask, position_ids=rows.positions, use_cache=False
            ).last_hidden_state
            logits: torch.Tensor = self._lm.lm_head(hidden.flatten(0, 1)[rows.predictors])
        return logits


def _write(line_of: Progress | Validation, log: Path | None) -> None:
    values = {name: round(value, 6) if isinstance(value, float) else value for name, value in vars(line_of).items()}
    line = json.dumps(values)
    print(line, flush=True)
    if log:
        with log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def plot_loss(history: list[Progress], path: Path) -> None:
    """Loss and accuracy over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(7, 4))
    steps = [p.step for p in history]
    left.plot(steps, [p.loss for p in history], color="tab:blue", label="loss")
    left.set(xlabel="optimizer step", ylabel="loss on answer tokens", yscale="log")
    right = left.twinx()
    right.plot(steps, [p.accuracy for p in history], color="tab:orange", label="accuracy")
    right.set(ylabel="answer tokens predicted right", ylim=(0, 1))
    figure.legend(loc="center right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
