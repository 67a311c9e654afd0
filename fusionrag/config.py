"""Every knob of `fusionrag`: one field = one knob = one CLI flag = one TOML key, the same name everywhere.

Frozen dataclasses, validated when built. Command-line flags and the configuration table in the docs are generated from
these fields and their `help`; nothing else defines a default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from fusionrag.errors import ConfigError

MAX_AUTO_ARENA_TOKENS = 65536
DENSE_ATTENTION = ("auto", "flash-attn", "sdpa", "rows")
METHODS = ("attention", "fusionrag", "cacheblend", "cacheblend_gradual", "epic", "random", "full", "reuse")


def knob(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with the help text that the CLI and the docs show."""
    return field(default=default, metadata={"help": help, **metadata})


def require(condition: bool, name: str, message: str) -> None:
    """Raises ConfigError naming the field unless `condition`."""
    if not condition:
        raise ConfigError(name, message)


@dataclass(frozen=True)
class ModelConfig:
    """Which language model runs, where, and with which prompt."""

    model: str = knob("smollm2-reader", "language model: 'smollm2-reader' (packaged), a local directory, or a hub id")
    device: str = knob("auto", "'cpu', 'cuda', 'cuda:1', or 'auto' (CUDA when there is one)")
    dtype: str = knob("auto", "'float32', 'bfloat16', 'float16', or 'auto' (float32 on CPU, bfloat16 on CUDA)")
    max_model_len: int = knob(0, "longest prompt plus answer in tokens; 0 takes the model's own limit")

    dense_attention: str = knob(
        "auto",
        "what attends where all rows of a prompt are run on a GPU: flash-attn (4, 3 or 2, where installed), sdpa "
        "(torch's fused kernels), rows (our own kernel, which serves everything else), or auto: the first that works",
    )

    def __post_init__(self) -> None:
        require(
            self.dense_attention in DENSE_ATTENTION,
            "dense_attention",
            f"must be one of {', '.join(DENSE_ATTENTION)}, got {self.dense_attention!r}",
        )
        require(self.dtype in ("auto", "float32", "bfloat16", "float16"), "dtype", f"unknown dtype {self.dtype!r}")
        require(self.max_model_len >= 0, "max_model_len", "must be 0 (the model's own limit) or positive")


@dataclass(frozen=True)
class PromptConfig:
    """The words around passages and question. The defaults are the prompt that the packaged reader was trained on."""

    instruction: str = knob(
        "You answer questions from the given passages. Reply with the answer only, in a few words.",
        "system message in front of all passages; part of every stored KV, so changing it invalidates them",
    )
    passages_header: str = knob("Passages:\n", "text between the instruction and the first passage")
    chunk_template: str = knob("{title}: {text}\n\n", "how a passage is spelled; uses {title} and {text}")
    untitled_chunk_template: str = knob("{text}\n\n", "how a passage without a title is spelled; uses {text}")
    question_template: str = knob(
        "Question: {question}\nAnswer with a few words only.", "how the question is spelled; uses {question}"
    )

    def __post_init__(self) -> None:
        for name, fields in (
            ("chunk_template", ("{title}", "{text}")),
            ("untitled_chunk_template", ("{text}",)),
            ("question_template", ("{question}",)),
        ):
            for part in fields:
                require(part in getattr(self, name), name, f"must contain {part}")


@dataclass(frozen=True)
class ReuseConfig:
    """How stored KV is turned into an answer. The baselines are values of these fields, not code paths."""

    method: str = knob("attention", f"which tokens to recompute: {', '.join(METHODS)}")
    recompute_ratio: float = knob(0.15, "share of the reused tokens that is recomputed, 0 to 1; 1 is full prefill")
    # better than the upper half in all four cells of the selection halves, and a quarter of the probe is saved
    probe_layers: str = knob(
        "third-quarter",
        "layers whose attention scores the tokens (method attention): all, late (upper half), third-quarter, last, "
        "or ranges: 8-19,25",
    )
    probe_rows: str = knob("tail", "rows whose attention is added up: the whole tail, or only the question's tokens")
    normalize_layers: bool = knob(True, "scale each probed layer's attention to the same mass before adding up")
    carry: float = knob(
        0.0,
        "importance carried over to other chunks that name the same thing, as a share of all importance (attention)",
    )
    # 1 was worth +7.5 F1 points [1.9, 13.6] at a ratio of 0.15 (README, n = 140)
    correction: float = knob(
        1.0,
        "weight in [0, 1] of the mean fresh-minus-stored residual added to a chunk's tokens left alone",
    )
    # against 1: no difference in F1 or KL on the selection halves, and up to a tenth of the time less
    recompute_depth: float = knob(
        0.85,
        "share of the layers, from the lowest, in which selected tokens are recomputed; above, stored KV stays",
    )
    first_chunk_raw: bool = knob(True, "take the first chunk's raw KV: behind the prefix it is exact")

    def __post_init__(self) -> None:
        require(self.probe_rows in ("tail", "question"), "probe_rows", "must be 'tail' or 'question'")
        require(self.method in METHODS, "method", f"unknown method {self.method!r}; one of {', '.join(METHODS)}")
        require(0 <= self.recompute_ratio <= 1, "recompute_ratio", f"must lie in [0, 1], got {self.recompute_ratio}")
        require(0 < self.recompute_depth <= 1, "recompute_depth", f"must lie in (0, 1], got {self.recompute_depth}")
        require(0 <= self.carry <= 10, "carry", f"must lie in [0, 10], got {self.carry}")
        require(0 <= self.correction <= 1, "correction", f"must lie in [0, 1], got {self.correction}")

    def with_method(self, method: str) -> ReuseConfig:
        """Another method by name. The published ones come as published, that is without correction."""
        if method == "attention":
            return replace(self, method=method)
        return replace(self, method=method, correction=0.0, carry=0.0, recompute_depth=1.0)

    def recomputed_layers(self, num_layers: int) -> int:
        """How many layers, from the lowest, selected tokens are run through."""
        return max(1, math.ceil(round(self.recompute_depth * num_layers, 6)))

    @property
    def effective_ratio(self) -> float:
        """The ratio that is run: methods `full` and `reuse` are ratios 1 and 0."""
        return {"full": 1.0, "reuse": 0.0}.get(self.method, self.recompute_ratio)


ORDERS = ("similarity_first", "similarity_last")


@dataclass(frozen=True)
class RetrievalConfig:
    """What is searched with, and how the passages found stand in the prompt."""

    order: str = knob(
        "similarity_last", "order in the prompt: similarity_last (nearest to the question) or similarity_first"
    )
    history_turns: int = knob(
        1, "earlier questions of a conversation, with their answers, that are searched with beside the last; 0: none"
    )

    def __post_init__(self) -> None:
        require(self.order in ORDERS, "order", f"must be one of {', '.join(ORDERS)}")
        require(0 <= self.history_turns <= 16, "history_turns", f"must lie in [0, 16], got {self.history_turns}")


@dataclass(frozen=True)
class PreprocessConfig:
    """The offline job."""

    num_related: int = knob(3, "related chunks that each chunk's fused KV is computed behind; 0: raw only")
    related_by: str = knob(
        "both", "how related chunks are found: words (rare words shared), meaning (nearest vectors), or both"
    )
    fuse_behind: str = knob(
        "each",
        "each: one KV behind each related chunk, and a request takes that of a chunk it holds as well; "
        "all: one KV behind all of them",
    )
    near_duplicate: float = knob(0.95, "chunks at least this similar (cosine) are skipped as related chunks")

    def __post_init__(self) -> None:
        require(0 <= self.num_related <= 64, "num_related", f"must lie in [0, 64], got {self.num_related}")
        require(self.related_by in ("words", "meaning", "both"), "related_by", f"unknown way {self.related_by!r}")
        require(self.fuse_behind in ("each", "all"), "fuse_behind", "must be 'each' or 'all'")
        require(0 < self.near_duplicate <= 1, "near_duplicate", f"must lie in (0, 1], got {self.near_duplicate}")


@dataclass(frozen=True)
class StoreConfig:
    """Where stored KV lives and how much of it stays in memory."""

    kv_codec: str = knob("none", "how KV is written: none (the model's dtype), float16, int8, int4")
    host_tier_bytes: int = knob(1 << 30, "host memory for the most recently used KV objects, in bytes; 0 turns it off")
    device_tier_bytes: int = knob(
        1 << 30, "device memory for the most recently used KV objects, in bytes; only on a GPU; 0 turns it off"
    )
    verify_checksum: bool = knob(True, "verify each object's checksum when it is read from disk")

    def __post_init__(self) -> None:
        require(self.kv_codec in ("none", "float16", "int8", "int4"), "kv_codec", f"unknown codec {self.kv_codec!r}")
        require(self.host_tier_bytes >= 0, "host_tier_bytes", "must not be negative")
        require(self.device_tier_bytes >= 0, "device_tier_bytes", "must not be negative")


@dataclass(frozen=True)
class EngineConfig:
    """The scheduler's budgets."""

    arena_tokens: int = knob(
        0, "slots of the KV arena shared by all live requests; 0: four times max_model_len, at most 65536"
    )
    max_batch_tokens: int = knob(1024, "rows of one forward pass; longer prefills are split over several steps")
    route: str = knob(
        "auto", "auto: full prefill instead of reuse where it is predicted to be faster; reuse: always as asked"
    )
    max_num_requests: int = knob(16, "requests that run at the same time")
    max_queue: int = knob(256, "requests that may wait; one more is refused")
    background_share: float = knob(
        0.1, "share of the engine's time that computing stored KV may take while requests are running, 0 to 0.9"
    )
    background_tokens: int = knob(
        256, "rows of one background pass, at least one chunk; a request that comes in waits for its end"
    )

    def __post_init__(self) -> None:
        require(self.max_batch_tokens >= 16, "max_batch_tokens", "must be at least 16")
        require(self.max_num_requests >= 1, "max_num_requests", "must be at least 1")
        require(self.route in ("auto", "reuse"), "route", f"must be 'auto' or 'reuse', got {self.route!r}")
        require(self.max_queue >= 0, "max_queue", "must not be negative")
        require(0 <= self.background_share <= 0.9, "background_share", "must lie in [0, 0.9]")
        require(self.background_tokens >= 16, "background_tokens", "must be at least 16")
        require(self.arena_tokens >= 0, "arena_tokens", "must be 0 (automatic) or positive")

    def num_slots(self, max_model_len: int) -> int:
        """Slots of the arena: as configured, or four full-length requests within reason."""
        return self.arena_tokens or max(max_model_len, min(4 * max_model_len, MAX_AUTO_ARENA_TOKENS))
