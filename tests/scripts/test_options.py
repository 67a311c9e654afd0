"""One knob, one name: flag, TOML key and field; bad ones are refused by name."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import fields

import pytest

from fusionrag.config import ModelConfig, ReuseConfig
from fusionrag.errors import ConfigError
from index.config import SearchConfig
from index.errors import InvalidValue
from scripts.options import (
    add_common_flags,
    add_config_flags,
    all_configs,
    build,
    read_file,
    variable,
    warn_of_unknown_variables,
)
from server.config import ServerConfig


def parse(cls: type, *argv: str, config=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=config)
    add_config_flags(parser, cls)
    return parser.parse_args(argv)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """Whatever the environment of the tests says of knobs, these begin without."""
    for name in [name for name in os.environ if name.startswith("FUSIONRAG_")]:
        monkeypatch.delenv(name)


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


# --- the environment ---

EVERY_KNOB = [pytest.param(cls, field, id=field.name) for cls in all_configs() for field in fields(cls)]


@pytest.mark.parametrize(("cls", "field"), EVERY_KNOB)
def test_every_knob_can_be_given_by_the_environment(cls, field, monkeypatch, tmp_path):
    """The file has a value of no knob's type, so that only the variable's can be the one that is taken."""
    file = tmp_path / "c.toml"
    file.write_text(f"{field.name} = []\n")
    with pytest.raises(ConfigError, match=rf"^{field.name}: must be of type"):
        build(cls, parse(cls, config=file))
    monkeypatch.setenv("FUSIONRAG_" + field.name.upper(), str(field.default))
    assert build(cls, parse(cls, config=file)) == cls()


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch):
    file = tmp_path / "c.toml"
    file.write_text("top_k = 7\nscore_threshold = 0.5\n")
    monkeypatch.setenv("FUSIONRAG_TOP_K", "5")
    found = build(SearchConfig, parse(SearchConfig, config=file))
    assert (found.top_k, found.score_threshold) == (5, 0.5)
    assert build(SearchConfig, parse(SearchConfig, "--top-k", "3", config=file)).top_k == 3


@pytest.mark.parametrize("text", ["1", "true", "YES", "On", " true "])
@pytest.mark.parametrize("is_on", [True, False])
def test_truth_values_have_the_usual_spellings(text, is_on, monkeypatch):
    opposite = {"1": "0", "true": "false", "YES": "NO", "On": "Off", " true ": " false "}
    monkeypatch.setenv("FUSIONRAG_CORRECTION", "0.25")
    monkeypatch.setenv("FUSIONRAG_FIRST_CHUNK_RAW", text if is_on else opposite[text])
    found = build(ReuseConfig, parse(ReuseConfig))
    assert (found.first_chunk_raw, found.correction) == (is_on, 0.25)


@pytest.mark.parametrize(
    ("cls", "name", "text"),
    [
        (ServerConfig, "port", "tcp://10.0.0.1:8000"),  # what Kubernetes sets for a service of our name
        (ServerConfig, "port", ""),
        (ServerConfig, "port", "8000.5"),
        (ServerConfig, "log_json", "maybe"),
        (ServerConfig, "keep_alive_s", "soon"),
    ],
)
def test_a_malformed_variable_is_refused_by_its_name_and_the_knobs(cls, name, text, monkeypatch):
    monkeypatch.setenv(variable(name), text)
    with pytest.raises(ConfigError, match=f"^{name}: FUSIONRAG_{name.upper()} must be ") as refused:
        build(cls, parse(cls))
    assert repr(text) in str(refused.value)


def test_a_value_out_of_range_is_refused_wherever_it_comes_from(monkeypatch):
    monkeypatch.setenv("FUSIONRAG_PORT", "70000")
    with pytest.raises(ConfigError, match=r"^port: "):
        build(ServerConfig, parse(ServerConfig))


def test_a_secret_of_the_wrong_type_is_not_quoted(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("api_key = 123456\n")
    with pytest.raises(ConfigError, match=r"^api_key: must be of type str") as refused:
        build(ServerConfig, parse(ServerConfig, config=file))
    assert "123456" not in str(refused.value)


def test_help_shows_every_variable():
    for cls in all_configs():
        parser = argparse.ArgumentParser()
        add_config_flags(parser, cls)
        text = parser.format_help()
        assert all(variable(field.name) in text for field in fields(cls))


def test_data_directory_and_file_can_be_given_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSIONRAG_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("FUSIONRAG_CONFIG", str(tmp_path / "c.toml"))
    parser = argparse.ArgumentParser()
    add_common_flags(parser)
    assert vars(parser.parse_args([])) == {"data_dir": tmp_path, "config": tmp_path / "c.toml"}
    assert parser.parse_args(["--data-dir", "here"]).data_dir.name == "here"


def test_a_variable_that_is_no_knob_is_warned_of_without_its_value(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("FUSIONRAG_TOPK", "hush")
    monkeypatch.setenv("FUSIONRAG_TOP_K", "5")
    warn_of_unknown_variables()
    assert "FUSIONRAG_TOPK is no knob" in caplog.text
    assert "hush" not in caplog.text and "FUSIONRAG_TOP_K " not in caplog.text
