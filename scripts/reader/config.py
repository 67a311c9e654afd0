"""Every knob of making the reader: one field = one knob = one flag. Frozen, validated when built."""

from __future__ import annotations

from dataclasses import dataclass

from fusionrag.config import knob, require


@dataclass(frozen=True)
class ContextConfig:
    """What a training context holds and what is asked of it."""

    max_questions: int = knob(14, "most questions that hang off one context")
    human_per_context: float = knob(1.7, "human-written questions per context, on average")
    counterfactual_share: float = knob(0.6, "share of links and human questions whose people or answers are changed")
    year_share: float = knob(1.0, "share of passages whose years become those of another; below 1, learned by heart")
    plain_share: float = knob(0.04, "share of contexts in lower case and without titles")
    bridge_share: float = knob(0.29, "weight of two-hop questions")
    comparison_share: float = knob(0.45, "weight of comparisons")
    fact_share: float = knob(0.1, "weight of questions about one fact")
    sentence_share: float = knob(0.16, "weight of questions made from a sentence")
    first_drill_share: float = knob(0.9, "share of contexts that are drills for comparing dates, at first")
    drill_share: float = knob(0.3, "share of contexts that are drills once `drill_tokens` were made")
    drill_tokens: float = knob(20e6, "tokens over which the share of drills falls")

    def __post_init__(self) -> None:
        require(self.max_questions > 0, "max_questions", "must be positive")
        require(0 <= self.counterfactual_share <= 1, "counterfactual_share", "must be between 0 and 1")
        require(0 <= self.year_share <= 1, "year_share", "must be between 0 and 1")
        require(0 <= self.plain_share <= 1, "plain_share", "must be between 0 and 1")
        require(0 <= self.first_drill_share <= 1, "first_drill_share", "must be between 0 and 1")
        require(0 <= self.drill_share <= 1, "drill_share", "must be between 0 and 1")
        require(self.drill_tokens > 0, "drill_tokens", "must be positive")


@dataclass(frozen=True)
class TrainingConfig:
    """The adapter and how it learns."""

    rank: int = knob(24, "rank of the low-rank matrices")
    scale: float = knob(2.0, "what B·A is multiplied by: alpha divided by rank")
    learning_rate: float = knob(1e-3, "peak learning rate of the low-rank matrices")
    norm_learning_rate: float = knob(1e-4, "peak learning rate of the norms")
    max_steps: int = knob(3000, "optimizer steps; 0 trains nothing and only scores")
    max_seconds: float = knob(1200.0, "the schedule also ends when this much time has passed")
    warmup: float = knob(0.03, "share of the schedule over which the learning rate rises")
    final: float = knob(0.03, "share of the peak learning rate that is left at the end")
    clip: float = knob(1.0, "largest norm of the gradient")
    rows: int = knob(4, "rows of packed contexts in an optimizer step")
    row_tokens: int = knob(8192, "tokens in a row; a multiple of 128")
    micro_rows: int = knob(4, "rows that run at once; fewer take less memory")
    num_workers: int = knob(8, "processes that make contexts; 0 makes them in between")
    validate_every: int = knob(300, "optimizer steps between two looks at contexts that are set aside")
    seed: int = knob(0, "of the data and of a new adapter's weights")
    compile: bool = knob(True, "compile the decoder layers (CUDA only)")

    def __post_init__(self) -> None:
        require(self.max_seconds > 0, "max_seconds", "must be positive")
        require(self.rank > 0, "rank", "must be positive")
        require(self.rows % self.micro_rows == 0, "micro_rows", "must divide rows")
        require(self.row_tokens % 128 == 0, "row_tokens", "must be a multiple of 128")
