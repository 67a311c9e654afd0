"""Every knob refuses by name what it cannot be, and explains itself."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from fusionrag import config
from fusionrag.config import METHODS, EngineConfig, ReuseConfig
from fusionrag.errors import ConfigError, FusionRAGError

CONFIGS = [value for name, value in vars(config).items() if name.endswith("Config")]
NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        ("ModelConfig", "dtype", ["float64", "half", ""]),
        ("ModelConfig", "max_model_len", [-1]),
        ("PromptConfig", "chunk_template", ["{text}", "{title}", ""]),
        ("PromptConfig", "untitled_chunk_template", ["", "text"]),
        ("PromptConfig", "question_template", ["Q:"]),
        ("ReuseConfig", "method", ["", "Attention", "best"]),
        ("ReuseConfig", "recompute_ratio", [-0.01, 1.01, NAN, 15]),
        ("ReuseConfig", "correction", [-0.1, 1.1, NAN]),
        ("ReuseConfig", "probe_rows", ["", "all"]),
        ("RetrievalConfig", "order", ["", "random"]),
        ("PreprocessConfig", "num_related", [-1, 65]),
        ("PreprocessConfig", "near_duplicate", [0, 1.1, NAN]),
        ("StoreConfig", "kv_codec", ["", "int2"]),
        ("StoreConfig", "host_tier_bytes", [-1]),
        ("EngineConfig", "max_batch_tokens", [0, 15]),
        ("EngineConfig", "max_num_requests", [0]),
        ("EngineConfig", "max_queue", [-1]),
        ("EngineConfig", "arena_tokens", [-1]),
    ],
)
def test_a_value_that_a_knob_cannot_have_is_refused_by_name(kind, field, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"^{field}: ") as error:
            getattr(config, kind)(**{field: value})
        assert error.value.field == field and isinstance(error.value, FusionRAGError)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_knob_has_a_default_and_says_what_it_does(kind):
    built = kind()
    for field in fields(kind):
        assert len(field.metadata["help"]) > 10, field.name
        with pytest.raises(FrozenInstanceError):
            setattr(built, field.name, None)


def test_no_knob_has_two_homes():
    """One name, one knob: flags, TOML keys and benchmark columns are these names."""
    names = [field.name for kind in CONFIGS for field in fields(kind)]
    assert len(CONFIGS) == 7 and len(names) == len(set(names))


def test_the_baselines_are_ratios():
    ratios = {method: ReuseConfig(method=method, recompute_ratio=0.3).effective_ratio for method in METHODS}
    assert ratios == {**dict.fromkeys(METHODS, 0.3), "full": 1.0, "reuse": 0.0}


@pytest.mark.parametrize(
    ("arena_tokens", "max_model_len", "expected"),
    [(0, 1000, 4000), (0, 30_000, 65_536), (0, 100_000, 100_000), (500, 1000, 500)],
)
def test_an_automatic_arena_holds_four_long_requests_within_reason_and_always_one(
    arena_tokens, max_model_len, expected
):
    assert EngineConfig(arena_tokens=arena_tokens).num_slots(max_model_len) == expected
