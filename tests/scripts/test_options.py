"""One knob, one name: flag, TOML key and field; bad ones are refused by name."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from fusionrag.config import ModelConfig, ReuseConfig
from fusionrag.errors import ConfigError
from index.config import SearchConfig
from index.errors import InvalidValue
from scripts.options import add_config_flags, all_configs, build, read_file


def parse(cls: type, *argv: str, config=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=config)
    add_config_flags(parser, cls)
    return parser.parse_args(argv)


def test_no_two_knobs_share_a_name():
    names = [field.name for cls in all_configs() for field in fields(cls)]
    assert len(names) == len(set(names))


def test_every_knob_has_a_help_text_and_a_flag():
    for cls in all_configs():
        parser = argparse.ArgumentParser()
        add_config_flags(parser, cls)
        flags = set(parser._option_string_actions)
        for field in fields(cls):
            assert field.metadata["help"]
            assert "--" + field.name.replace("_", "-") in flags


def test_no_flags_and_no_file_give_the_defaults():
    for cls in all_configs():
        assert build(cls, parse(cls)) == cls()


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("top_k = 7\nscore_threshold = 0.5\n")
    assert build(SearchConfig, parse(SearchConfig, config=file)).top_k == 7
    found = build(SearchConfig, parse(SearchConfig, "--top-k", "3", config=file))
    assert (found.top_k, found.score_threshold) == (3, 0.5)


def test_a_boolean_can_be_switched_both_ways():
    assert build(ReuseConfig, parse(ReuseConfig, "--no-first-chunk-raw")).first_chunk_raw is False
    assert build(ReuseConfig, parse(ReuseConfig, "--first-chunk-raw")).first_chunk_raw is True


def test_a_whole_number_in_the_file_is_a_float_where_one_is_wanted(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("recompute_ratio = 1\n")
    assert build(ReuseConfig, parse(ReuseConfig, config=file)).recompute_ratio == 1.0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("topk = 5", "topk"),
        ("top_k = 'five'", "top_k"),
        ("top_k = 5.5", "top_k"),
        ("top_k = true", "top_k"),
        ("top_k = ", "config"),
        ("top_k = 0", "top_k"),
        ("[server]\nport = 1", "server"),
    ],
)
def test_a_bad_file_is_refused_and_the_key_is_named(tmp_path, text, named):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises((ConfigError, InvalidValue), match=named):
        build(SearchConfig, parse(SearchConfig, config=file))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        read_file(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan"])
def test_a_ratio_outside_zero_to_one_is_refused_by_name(value):
    with pytest.raises(ConfigError, match="recompute_ratio"):
        build(ReuseConfig, parse(ReuseConfig, "--recompute-ratio", value))


def test_an_unknown_dtype_is_refused_by_name():
    with pytest.raises(ConfigError, match="dtype"):
        build(ModelConfig, parse(ModelConfig, "--dtype", "float8"))
