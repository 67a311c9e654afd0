"""The commands as a user runs them, on a tiny model: results, resumption, and what bad input gets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fusionrag import kernels
from fusionrag.backends import KERNELS
from fusionrag.types import RequestStats
from index import Catalogue, DataDir, Document, Section
from scripts.cli import main
from scripts.commands.ask import print_ttft

KV_FILES = "kv/objects/*/*.safetensors"


def files(shell) -> dict[str, float]:
    """Every KV object with the time it was written."""
    return {path.name: path.stat().st_mtime_ns for path in shell.data_dir.glob(KV_FILES)}


def test_ingesting_the_same_file_again_changes_nothing(shell, documents, capsys):
    assert shell("ingest", documents) == 0
    assert "6 documents added" in capsys.readouterr().out
    assert shell("ingest", documents) == 0
    assert "0 documents added, 0 changed, 6 unchanged" in capsys.readouterr().out


def test_preprocess_computes_raw_and_fused_kv_once(preprocessed, capsys):
    before = files(preprocessed)
    assert len(before) == 18  # six raw, and six behind each of two
    assert preprocessed("preprocess", "--num-related", 2) == 0
    assert "0 objects computed; 6 raw and 12 fused of 6 chunks" in capsys.readouterr().out
    assert files(preprocessed) == before


def test_shards_side_by_side_do_the_whole_job(shell, documents, capsys):
    shell("ingest", documents)
    for shard in ("1/3", "2/3", "3/3"):
        assert shell("preprocess", "--num-related", 2, "--shard", shard) == 0
    assert "6 raw and 12 fused of 6 chunks" in capsys.readouterr().out.splitlines()[-1]


def test_a_changed_document_leaves_no_kv_of_its_old_text(preprocessed, documents, capsys):
    before = set(files(preprocessed))
    lines = documents.read_text().splitlines()
    lines[0] = json.dumps({"title": "Anna Brell", "text": "Anna Brell was a painter. She never left her village."})
    documents.write_text("\n".join(lines) + "\n")
    assert preprocessed("ingest", documents) == 0
    assert "1 changed" in capsys.readouterr().out
    assert preprocessed("preprocess", "--num-related", 2) == 0
    assert "6 raw and 12 fused of 6 chunks" in capsys.readouterr().out
    after = set(files(preprocessed))
    assert len(after) == 18 and len(before - after) >= 2
    with Catalogue(DataDir(preprocessed.data_dir).catalogue) as catalogue:
        assert {f"{o.digest}.safetensors" for o in catalogue.kv_objects("default")} == after


# --- delete -----------------------------------------------------------------------------------------------------------


def delete(shell, *args: object) -> int:
    return main(["delete", "--data-dir", str(shell.data_dir), "--collection", "default", *map(str, args)])


def test_deleting_by_file_folder_or_record_removes_text_and_kv(preprocessed, documents, tmp_path, capsys):
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in ("a.txt", "b.txt"):
        (notes / name).write_text(f"The {name} note is about nothing at all.")
    assert preprocessed("ingest", notes) == 0 and len(files(preprocessed)) == 18
    for path in notes.iterdir():
        path.unlink()  # gone from the disk, not from the collection
    capsys.readouterr()
    assert delete(preprocessed, notes / "a.txt", f"{documents}#2") == 0
    assert "2 documents with 2 chunks deleted" in capsys.readouterr().out
    assert len(files(preprocessed)) < 18
    assert delete(preprocessed, notes, documents) == 0
    assert "6 documents with 6 chunks deleted" in capsys.readouterr().out
    assert files(preprocessed) == {}
    with Catalogue(DataDir(preprocessed.data_dir).catalogue) as catalogue:
        assert catalogue.documents("default") == []


def test_deleting_a_collection_leaves_nothing_of_it(preprocessed, capsys):
    assert delete(preprocessed, "--all") == 0
    assert "6 documents with 6 chunks deleted" in capsys.readouterr().out
    assert files(preprocessed) == {} and list((preprocessed.data_dir / "faiss").iterdir()) == []
    assert delete(preprocessed, "--all") == 2
    assert "default" in capsys.readouterr().err


def test_a_delete_that_names_one_unknown_path_deletes_nothing(preprocessed, documents, capsys):
    for wrong in ([documents, "elsewhere.txt"], [], ["--all", documents]):
        assert delete(preprocessed, *wrong) == 2
    assert "'elsewhere.txt'" in capsys.readouterr().err
    assert len(files(preprocessed)) == 18


def test_an_upload_is_not_deleted_behind_the_servers_back(shell, documents, capsys):
    assert shell("ingest", documents) == 0
    with Catalogue(DataDir(shell.data_dir).catalogue) as catalogue:
        upload = Document("file-" + "0" * 24, "Up", (Section("", "up"),), "up.txt")
        catalogue.replace_document("default", upload, [], np.zeros((0, 384), np.float32))
    assert delete(shell, "up.txt") == 2
    assert "uploaded" in capsys.readouterr().err


def test_kv_that_nobody_booked_is_swept_once_its_chunk_has_left(preprocessed, documents):
    """A job that dies between storing and booking leaves such an object; it is kept as long as it can be of use."""
    with Catalogue(DataDir(preprocessed.data_dir).catalogue) as catalogue:
        catalogue.forget_kv([o.digest for o in catalogue.kv_objects("default")])
    assert preprocessed("preprocess", "--num-related", 2) == 0  # books them again
    before = files(preprocessed)
    assert len(before) == 18
    with Catalogue(DataDir(preprocessed.data_dir).catalogue) as catalogue:
        catalogue.forget_kv([o.digest for o in catalogue.kv_objects("default")])
    assert delete(preprocessed, f"{documents}#1") == 0
    left = files(preprocessed)
    assert len(left) == 15 and left.items() <= before.items()


def test_killing_preprocess_anywhere_loses_nothing_and_computes_nothing_twice(shell, documents):
    """A job killed by SIGKILL again and again ends with the objects of an undisturbed one, each written once."""
    shell("ingest", documents)
    command = [sys.executable, "-m", "scripts.cli", "preprocess", "--num-related", "2", "--max-batch-tokens", "64"]
    command += ["--data-dir", str(shell.data_dir), "--model", str(shell.model)]
    written: dict[str, float] = {}
    for kills in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(files(shell)) < 3 * (kills + 1):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = files(shell)
        assert written.items() <= now.items(), "an object was lost or written again"
        written = now
    assert 9 <= len(written) <= 18
    assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    assert written.items() <= files(shell).items()
    assert len(files(shell)) == 18


def test_ask_prints_the_answer_its_sources_and_the_ttft_breakdown(preprocessed, capsys):
    assert preprocessed("ask", "Where was Anna Brell born?", "--max-tokens", 4, "--top-k", 3) == 0
    out = capsys.readouterr().out
    assert out.count("documents.jsonl") == 3
    assert "Anna Brell" in out and "Time to first token" in out and "recompute " in out


def test_ask_says_when_it_did_not_go_as_asked_and_what_was_on_its_way(capsys):
    print_ttft(RequestStats(prompt_tokens=900, ttft_ms=120, way="full", predicted_ms=118.2, arrival_ms=9.5))
    out = capsys.readouterr().out
    assert "; full prefill was predicted to be faster (118 ms)" in out and "KV arrived in 9.5 ms" in out
    for stats in (RequestStats(way="full"), RequestStats(way="reuse", predicted_ms=20)):
        print_ttft(stats)
        assert "predicted" not in capsys.readouterr().out


@pytest.fixture
def fused_behind_all(monkeypatch):
    """One fused KV a chunk, so that what is wrong with it is what is wrong with the chunk."""
    monkeypatch.setenv("FUSIONRAG_FUSE_BEHIND", "all")


def test_doctor_explains_a_hit_a_raw_fallback_and_a_miss(fused_behind_all, preprocessed, capsys):
    def reuse() -> dict[str, int]:
        assert preprocessed("doctor", "--json") == 0
        return json.loads(capsys.readouterr().out)["collections"]["default"]["reuse"]

    capsys.readouterr()
    assert reuse() == {"fused KV is there": 6}
    with Catalogue(DataDir(preprocessed.data_dir).catalogue) as catalogue:
        objects = catalogue.kv_objects("default")
    gone = next(o for o in objects if o.kind == "fused")
    lost = next(o.chunk_id for o in objects if o.chunk_id != gone.chunk_id)
    for o in objects:
        if o == gone or o.chunk_id == lost:
            (preprocessed.data_dir / "kv" / "objects" / o.digest[:2] / f"{o.digest}.safetensors").unlink()
    found = reuse()
    assert found["fused KV is there"] == 4
    gone_from_disk = "its file is gone from the store (evicted by hand?); run preprocess"
    assert found[f"raw KV is there; fused KV is not: {gone_from_disk}"] == 1
    assert found[f"miss: {gone_from_disk}"] == 1


def test_doctor_says_what_runs_on_what_and_why(preprocessed, capsys):
    assert preprocessed("doctor", "--json", "--host-tier-bytes", 0, "--device", "cpu", "--route", "auto") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"] == {
        "dense_attention": "rows (it serves all rows on a CPU)",
        "kernels": dict.fromkeys(KERNELS, "plain torch: the model is on the CPU"),
        "decoding": "plain passes: the model is on the CPU",
        "loading": "before the passes",
        "host_tier": "off (host_tier_bytes = 0)",
        "device_tier": "none: the model is on the CPU",
        "route": "the fastest way, as predicted",
    }
    assert "device_memory" not in report


def test_doctor_knows_every_kernel():
    asked = [re.findall(r'takes\("(\w+)"', p.read_text()) for p in Path(kernels.__file__).parent.glob("*.py")]
    assert {name for names in asked for name in names} == set(KERNELS)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--instruction", "Answer in rhyme."), "computed for another instruction or chat template; run preprocess"),
        (("--kv-codec", "int8"), "computed for another codec; run preprocess"),
    ],
)
def test_doctor_names_what_differs_from_the_stored_kv(preprocessed, capsys, changed, named):
    capsys.readouterr()
    assert preprocessed("doctor", "--json", *changed) == 0
    (why,) = json.loads(capsys.readouterr().out)["collections"]["default"]["reuse"]
    assert why.startswith(f"miss: {named}")


def test_doctor_tells_damaged_and_stale_kv_apart(fused_behind_all, preprocessed, capsys):
    with Catalogue(DataDir(preprocessed.data_dir).catalogue) as catalogue:
        fused = [o for o in catalogue.kv_objects("default") if o.kind == "fused"]
        damaged, gone = next(
            (a, chunk_id)
            for a in fused
            for b in fused
            for chunk_id in b.related
            if chunk_id not in (a.chunk_id, *a.related)
        )
        path = preprocessed.data_dir / "kv" / "objects" / damaged.digest[:2] / f"{damaged.digest}.safetensors"
        path.rename(preprocessed.data_dir / "kv" / "quarantine" / path.name)
        left = catalogue.chunk("default", gone)
        catalogue.delete_document("default", left.chunk.document_id)
    capsys.readouterr()
    assert preprocessed("doctor", "--json") == 0
    reuse = json.loads(capsys.readouterr().out)["collections"]["default"]["reuse"]
    assert "raw KV is there; fused KV is not: its file was damaged and is set aside; run preprocess" in reuse
    assert any(why.startswith("raw KV is there; fused KV is stale: a chunk that it saw has left") for why in reuse)


def test_a_damaged_object_is_recomputed_set_aside_and_the_answer_stays(preprocessed, capsys):
    """A bit flipped on disk may cost time, never an answer."""
    flags = "--max-tokens 6 --top-k 6 --recompute-ratio 0.999999 --recompute-depth 1"
    ask = ("ask", "What is Lum?", *flags.split())
    assert preprocessed(*ask) == 0
    answer = capsys.readouterr().out.splitlines()[0]
    for path in preprocessed.data_dir.glob(KV_FILES):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    assert preprocessed(*ask) == 0
    assert capsys.readouterr().out.splitlines()[0] == answer
    assert len(list((preprocessed.data_dir / "kv" / "quarantine").iterdir())) >= 6


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("preprocess", "--collection", "nowhere"), "nowhere"),
        (("ask", "Who?", "--collection", "nowhere"), "nowhere"),
        (("preprocess", "--shard", "3/2"), "shard"),
        (("preprocess", "--num-related", "-1"), "num_related"),
        (("ask", "Who?", "--recompute-ratio", "-0.5"), "recompute_ratio"),
        (("ask", "Who?", "--recompute-ratio", "7"), "recompute_ratio"),
        (("ask", "Who?", "--method", "best"), "method"),
        (("ask", "Who?", "--probe-layers", "9-12"), "probe_layers"),
        (("ask", "", "--top-k", "3"), "question"),
        (
            (
                "ask",
                "Who? " * 2000,
            ),
            "max_tokens",
        ),
        (("ask", "Who?", "--max-tokens", "100000"), "max_tokens"),
        (("ask", "Who?", "--kv-codec", "int3"), "kv_codec"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_names_what_is_wrong(shell, documents, capsys, args, named):
    shell("ingest", documents)
    capsys.readouterr()
    assert shell(*args) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("model", ["no-such-model", "gpt2-like"])
def test_an_unusable_model_is_refused_before_anything_is_computed(tmp_path, documents, shell, capsys, model):
    shell("ingest", documents)
    path = tmp_path / model
    if model == "gpt2-like":
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "gpt2"}')
        for file in shell.model.glob("tokenizer*"):
            (path / file.name).write_bytes(file.read_bytes())
    assert main(["preprocess", "--data-dir", str(shell.data_dir), "--model", str(path)]) == 2
    assert ("gpt2" if model == "gpt2-like" else model) in capsys.readouterr().err
    assert not files(shell)


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02\xff"])
def test_an_unreadable_file_is_reported_and_the_others_are_ingested(shell, documents, tmp_path, capsys, content):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    assert shell("ingest", documents, bad) == 1
    captured = capsys.readouterr()
    assert "bad.txt" in captured.err
    assert "6 documents added" in captured.out


def test_a_second_writer_is_refused_and_told_who_is_first(shell, documents, capsys):
    with DataDir(shell.data_dir).lock(exclusive=True):
        assert shell("ingest", documents) == 2
    assert str(os.getpid()) in capsys.readouterr().err


def test_a_collection_of_another_tokenizer_is_refused(shell, documents, tmp_path, make_tokenizer, capsys):
    shell("ingest", documents)
    other = tmp_path / "other"
    other.mkdir()
    for file in shell.model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    make_tokenizer(merges=[("a", "n")]).save_pretrained(other)
    for command in (["preprocess"], ["ask", "Who?"], ["ingest", str(documents)]):
        assert main([*command, "--data-dir", str(shell.data_dir), "--model", str(other)]) == 2
        assert "default" in capsys.readouterr().err


def test_help_of_every_command_lists_its_knobs(capsys):
    for command in ("ingest", "preprocess", "serve", "ask", "evaluate", "doctor"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert "default:" in capsys.readouterr().out


def test_evaluate_measures_every_method_against_full_prefill_and_resumes(tmp_path, tiny_model, capsys):
    from tests.scripts.conftest import PASSAGES

    ctxs = [{"title": title, "text": text} for title, text in PASSAGES]
    examples = [{"question": f"Who is {t}?", "answers": [t], "ctxs": ctxs} for t, _ in PASSAGES[:2]]
    dataset, out, records = tmp_path / "d.json", tmp_path / "out.json", tmp_path / "r.jsonl"
    dataset.write_text(json.dumps(examples))
    args = ["evaluate", "--dataset", dataset, "--methods", "full,reuse,epic,cacheblend,fusionrag,attention,random"]
    args += ["--ratios", "0.15,1.0", "--num-related", "0,2", "--model", tiny_model, "--records", records, "--json", out]
    assert main([str(a) for a in args]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 1 + 2 * (1 + 5 * 2)
    for row in rows:
        assert row["n"] == 2
        if row["recompute_ratio"] == 1.0:
            assert row["kl_to_full"] <= 1e-4 and row["top1_agreement"] == 1.0
    assert any(row["kl_to_full"] > 1e-3 for row in rows)
    written = records.read_text()
    assert main([str(a) for a in args]) == 0
    assert records.read_text() == written
    assert "cacheblend" in capsys.readouterr().out


def test_bench_ttft_ends_with_one_line_of_json(tiny_model, capsys):
    args = ["bench", "ttft", "--model", str(tiny_model), "--num-chunks", "3", "--chunk-tokens", "64", "--repeats", "1"]
    assert main(args) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["method"] for row in result["rows"]] == ["full", "transformers", "reuse", "default"]
    assert all(row["ttft_ms_p50"] > 0 and row["n"] == 1 for row in result["rows"])


def test_bench_kernels_reports_every_kernel_and_its_share_of_a_ceiling(tiny_model, capsys):
    args = ["bench", "kernels", "--model", str(tiny_model), "--num-tokens", "300", "--repeats", "1"]
    assert main(args) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = result["rows"]
    kernels = {row["kernel"].partition(",")[0] for row in rows}
    assert {"SDPA", "rows attention", "attention mass", "load", "row preparation", "silu_mul"} <= kernels
    assert all(row["ms"] > 0 and {"share_of_matrix_ceiling", "share_of_copy_ceiling"} & set(row) for row in rows)
    assert result["matrix_tflops"] > 0 and result["copy_gbs"] > 0


def test_bench_kernels_takes_shapes_instead_of_a_model_and_refuses_half_of_one(capsys):
    shape = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
    args = ["bench", "kernels", "--num-tokens", "300", "--repeats", "1", "--only", "decode,probe"]
    assert main([*args, *shape]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["shape"]["head_dim"] == 16
    assert main([*args, *shape[:2]]) == 2
    assert "--head-dim" in capsys.readouterr().err
    assert main([*args[:-1], "decod", *shape]) == 2
    assert "decod" in capsys.readouterr().err


@pytest.fixture
def questions(tmp_path):
    from tests.scripts.conftest import PASSAGES

    ctxs = [{"title": title, "text": text} for title, text in PASSAGES]
    path = tmp_path / "questions.json"
    path.write_text(
        json.dumps([{"question": f"Who is {t}?", "answers": [t], "ctxs": ctxs[:3]} for t, _ in PASSAGES[:4]])
    )
    return path


def test_evaluate_on_a_half_answers_every_other_question(tmp_path, tiny_model, questions):
    shared = ["evaluate", "--dataset", str(questions), "--methods", "full", "--model", str(tiny_model)]
    found = []
    for half in ("selection", "reporting"):
        out = tmp_path / f"{half}.jsonl"
        assert main([*shared, "--half", half, "--records", str(out)]) == 0
        found.append({json.loads(line)["example_id"] for line in out.read_text().splitlines()})
    assert [len(ids) for ids in found] == [2, 2] and not found[0] & found[1]


def test_evaluate_compare_pairs_two_runs_and_two_configurations(tmp_path, tiny_model, questions, capsys):
    shared = ["evaluate", "--dataset", str(questions), "--model", str(tiny_model), "--methods", "full,reuse,default"]
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    assert main([*shared, "--records", a]) == main([*shared, "--records", b]) == 0
    capsys.readouterr()
    assert main(["evaluate", "compare", a, b]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 and all("+0.000 [+0.000, +0.000]" in line for line in lines[2:])
    assert main(["evaluate", "compare", f"{a}#default@0.15@0", f"{a}#reuse@0@0"]) == 0
    (line,) = capsys.readouterr().out.splitlines()[2:]
    assert "default (ratio 0.15, 0 related)" in line and "reuse (ratio 0, 0 related)" in line
    assert main(["evaluate", "compare", f"{a}#default@0.15@0", b]) == 2
    assert main(["evaluate", "compare", f"{a}#default@0.7@0", f"{b}#reuse@0@0"]) == 2


def test_evaluate_compare_and_report_show_a_method_among_its_rivals_from_records_alone(
    tmp_path, tiny_model, questions, capsys
):
    shared = ["evaluate", "--dataset", str(questions), "--model", str(tiny_model), "--methods"]
    a, b, figure = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "quality.png"))
    assert main([*shared, "full,reuse,default", "--records", a]) == 0
    expected = capsys.readouterr().out
    assert main([*shared, "epic,prophetkv", "--records", b]) == 0
    capsys.readouterr()
    assert main(["evaluate", "report", a]) == 0
    assert capsys.readouterr().out == expected
    assert main(["evaluate", "report", a, b, "--ttft-from", b, "--plot", figure]) == 0
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[1:]] == ["full", "reuse", "default", "epic", "prophetkv"]
    assert [line.split()[-2] == "-" for line in table[1:]] == [False, True, True, False, False]
    assert Path(figure).read_bytes().startswith(b"\x89PNG")
    assert main(["evaluate", "compare", f"{a}#default", b]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 3 and all(line.startswith("default (ratio 0.15, 0 related)") for line in lines)
    assert main(["evaluate", "compare", a]) == 2 and "what to compare" in capsys.readouterr().err


def test_evaluate_takes_knobs_of_the_offline_job_and_stale_neighbours(tmp_path, tiny_model, questions):
    """All neighbours of one chunk each changed: only raw KV is left. None changed: as without the knob."""
    methods = [
        "default:num_related=0",
        "default",
        *(f"default:stale_share={share}" for share in (0, 1)),
        "default:fuse_behind=all",
        *(f"default:fuse_behind=all+stale_share={share}" for share in (0, 1)),
    ]
    out = tmp_path / "records.jsonl"
    args = ["evaluate", "--dataset", questions, "--model", tiny_model, "--related-by", "words", "--num-related", 2]
    assert main([*map(str, args), "--methods", ",".join(methods), "--ratios", "0,0.3", "--records", str(out)]) == 0
    found: dict[tuple[str, float, int], list[float]] = {}
    for record in map(json.loads, out.read_text().splitlines()):
        key = record["method"], record["recompute_ratio"], record["num_related"]
        found.setdefault(key, []).append(record["kl_to_full"])
    for ratio in (0, 0.3):
        raw, each, every = found["default", ratio, 0], found["default", ratio, 2], "default:fuse_behind=all"
        assert found["default:stale_share=1", ratio, 2] == raw
        assert found["default:stale_share=0", ratio, 2] == each != raw
        assert found[f"{every}+stale_share=0", ratio, 2] == found[every, ratio, 2]
        assert found[f"{every}+stale_share=1", ratio, 2] not in (found[every, ratio, 2], raw)


def test_evaluate_tune_finds_a_ratio_and_reports_it_on_the_other_half(tmp_path, tiny_model, questions, capsys):
    out = tmp_path / "tuned.json"
    args = ["evaluate", "tune", "--dataset", questions, "--model", tiny_model, "--ratios", "0,0.5", "--json", out]
    assert main([str(a) for a in args]) == 0
    assert "recompute_ratio = " in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert row["recompute_ratio"] in (0, 0.5, 1) and row["num_questions"] == 2
    assert main([*map(str, args), "--target", "2"]) == 2 and "target" in capsys.readouterr().err


@pytest.mark.parametrize("enough", [0.0, 0.05, 0.1, 0.3, 1.0])
def test_the_smallest_ratio_that_is_enough_is_found(enough):
    from scripts.commands.evaluate_tune import smallest

    tried: list[float] = []
    ratios = [0.0, 0.05, 0.1, 0.2, 0.3, 1.0]
    assert smallest(ratios, lambda ratio: tried.append(ratio) or ratio >= enough) == enough
    assert len(tried) <= 3
