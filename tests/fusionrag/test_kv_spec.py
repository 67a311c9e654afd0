"""A spec names the bytes of a stored KV: whatever changes them changes the name, and nothing else does (I5)."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from fusionrag.layout import Naming, naming
from fusionrag.types import FORMAT_VERSION, KVSpec, PromptChunk

SPEC = KVSpec("model", "float32", "none", (1, 2), (3, 4, 5), "fused", ("a", "b"))
CHANGES = [
    {"model_fingerprint": "model2"},
    {"dtype": "bfloat16"},
    {"codec": "int8"},
    {"prefix_ids": (1, 3)},
    {"prefix_ids": (1,)},
    {"prefix_ids": (1, 2, 3), "chunk_ids": (4, 5)},  # the same ids, cut elsewhere
    {"chunk_ids": (3, 4)},
    {"chunk_ids": (3, 5, 4)},
    {"chunk_ids": (34, 5)},
    {"kind": "raw"},
    {"kind": "raw", "related": ()},
    {"related": ()},
    {"related": ("a",)},
    {"related": ("b", "a")},  # they stood in another order
    {"related": ("ab",)},
    {"owner": "somebody"},
    {"format_version": FORMAT_VERSION + 1},
]


def test_every_field_is_in_the_name():
    assert {name for change in CHANGES for name in change} == {f.name for f in fields(KVSpec)}
    digests = {replace(SPEC, **change).digest for change in CHANGES}
    assert len(digests | {SPEC.digest}) == len(CHANGES) + 1


def test_equal_specs_have_equal_names():
    assert replace(SPEC).digest == SPEC.digest
    assert len(SPEC.digest) == 64 and set(SPEC.digest) <= set("0123456789abcdef")


def test_the_name_of_a_spec_does_not_change_between_releases():
    """Else every store on disk would be computed again. Whoever changes it on purpose changes FORMAT_VERSION too."""
    assert FORMAT_VERSION == 2
    assert SPEC.digest == "224449af2dea6d5740f5551d4da23c6c612018b36fcef8366adbd5598c93b58f"


def test_naming_takes_model_dtype_codec_and_prefix_from_where_they_are(bench):
    names = naming(bench.model, "int8", (7, 8))
    expected = Naming(bench.model.fingerprint, "float32", "int8", (7, 8))
    assert names == expected
    spec = names.spec([1, 2], "raw")
    assert (spec.prefix_ids, spec.chunk_ids, spec.kind, spec.related) == ((7, 8), (1, 2), "raw", ())


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("first_chunk_raw", [True, False])
@pytest.mark.parametrize("related", [None, (), ("x",)])
def test_fused_kv_is_preferred_but_where_raw_is_exact_or_all_there_is(is_first, first_chunk_raw, related):
    names = Naming("model", "float32", "none", (1,))
    kinds = [s.kind for s in names.candidates(PromptChunk("c", (2,), related), is_first, first_chunk_raw)]
    raw_only = not related or (is_first and first_chunk_raw)
    assert kinds == (["raw"] if raw_only else ["fused", "raw"])


def test_kv_behind_one_chunk_stands_for_prompts_that_hold_that_chunk_best_in_front():
    names = Naming("model", "float32", "none", (1,))
    chunk = PromptChunk("c", (2,), ("w", "x", "y", "z"), "each")

    def found(**place):
        return [s.related for s in names.candidates(chunk, is_first=False, first_chunk_raw=True, **place)]

    assert found() == found(before=["a"], after=["b"]) == [()]  # raw alone
    assert found(before=["z", "x"]) == [("x",), ("z",), ()]  # by rank, not by place in the prompt
    assert found(before=["y"], after=["w"]) == [("y",), ("w",), ()]
