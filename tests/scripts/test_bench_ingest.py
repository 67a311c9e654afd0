"""`bench ingest` from end to end: a real server on a tiny model, uploads, questions meanwhile, and the figures."""

from __future__ import annotations

import json

import pytest

from fusionrag.errors import ConfigError
from scripts.bench import ingest
from scripts.cli import main


@pytest.fixture
def config(tmp_path, tiny_model):
    path = tmp_path / "config.toml"
    path.write_text(f'model = "{tiny_model}"\nnum_related = 1\nchunk_tokens = 256\ntop_k = 2\n')
    return path


@pytest.mark.slow
def test_passages_are_ingested_by_a_real_server_while_clients_ask(config, documents, tmp_path, capsys):
    result = tmp_path / "result.json"
    sizes = ["--num-passages", "4", "--num-start-passages", "2", "--num-files", "2", "--num-clients", "2"]
    args = ["--passages", str(documents), *sizes, "--rest-s", "2", "--config", str(config), "--json", str(result)]
    assert main(["bench", "ingest", *args]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(result.read_text())
    rest, loaded = printed["rows"]
    assert (rest["phase"], loaded["phase"]) == ("rest", "ingest")
    assert rest["n"] > 0 and rest["failed"] == loaded["failed"] == loaded["files_failed"] == 0
    assert 0 < rest["ttft_ms_p50"] <= rest["ttft_ms_p95"] <= rest["ttft_ms_p99"]
    if loaded["n"]:  # four passages may be in before anybody has asked another question
        assert loaded["p95_vs_rest"] == round(loaded["ttft_ms_p95"] / rest["ttft_ms_p95"], 2)
    assert loaded["event_loop_lag_ms_max"] > 0 and loaded["passages_per_s"] > 0
    assert set(rest["kv_from"]) <= {"host", "disk"}, "at rest all KV is there"


def test_too_few_passages_are_named_before_anything_is_started(documents, capsys):
    assert main(["bench", "ingest", "--passages", str(documents), "--num-passages", "100"]) == 2
    assert "num_passages: there are 6 passages, 150 are needed" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_told(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("no_such_knob = 1\n")
    with pytest.raises(ConfigError, match="the server did not start"), ingest._server(tmp_path, bad):
        pass
