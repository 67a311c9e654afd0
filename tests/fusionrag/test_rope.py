"""Rotation: composes, keeps lengths, leaves the other dimensions alone; and what is stored can be moved anywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusionrag.arena import KVArena
from fusionrag.rope import Rope
from fusionrag.stitch import CaptureKV, place_
from fusionrag.types import ChunkKV, RowGroup, Span

HEAD_DIM = 8
positions = st.integers(0, 4000)


def rope(rotary_dim=HEAD_DIM, scaling=1.0):
    half = rotary_dim // 2
    return Rope(10000.0 ** -(torch.arange(half) / half), scaling)


def keys(seed=0, num_rows=1, dtype=torch.float32):
    return torch.randn(2, num_rows, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotated(r, x, *at):
    return r.rotate(x, *r.tables(torch.tensor(at)))


def close(x, y, atol=2e-3):  # an angle of 4000 radians has an error of 2e-4 in fp32
    torch.testing.assert_close(x, y, rtol=0, atol=atol)


@given(positions, positions)
def test_shifting_a_rotated_key_is_rotating_it_to_the_new_place(begin, end):
    for scaling in (1.0, 1.3):
        r = rope(scaling=scaling)
        close(r.shift(rotated(r, keys(), begin), torch.tensor([end - begin])), rotated(r, keys(), end))


@given(positions, positions)
def test_shifts_compose(first, second):
    r, x = rope(), keys()
    both = r.shift(r.shift(x, torch.tensor([first])), torch.tensor([-second]))
    close(both, r.shift(x, torch.tensor([first - second])))


@given(positions)
def test_rotation_keeps_lengths(at):
    lengths = rotated(rope(), keys(), at).norm(dim=-1)
    close(lengths, keys().norm(dim=-1), atol=1e-5)
    close(rotated(rope(scaling=1.3), keys(), at).norm(dim=-1), 1.3 * keys().norm(dim=-1), atol=1e-5)


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_scores_depend_on_the_distance_alone(query_at, key_at, by):
    r, query, key = rope(), keys(1), keys(2)
    near = (rotated(r, query, query_at) * rotated(r, key, key_at)).sum(-1)
    far = (rotated(r, query, query_at + by) * rotated(r, key, key_at + by)).sum(-1)
    close(near, far, atol=2e-2)


@given(positions)
def test_dimensions_without_rotation_are_untouched(at):
    r, x = rope(rotary_dim=4), keys()
    out = rotated(r, x, at)
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert torch.equal(rope(rotary_dim=4).shift(out, torch.tensor([-at]))[..., 4:], x[..., 4:])
    close(out[..., :4], Rope(r.inv_freq).rotate(x[..., :4], *r.tables(torch.tensor([at]))))


def test_rotation_at_position_0_changes_nothing():
    assert torch.equal(rotated(rope(), keys(num_rows=3), 0, 0, 0), keys(num_rows=3))


def test_rotation_by_halves_spelled_out():
    x, r = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), Rope(torch.tensor([0.5, 0.25]))
    cos, sin = torch.tensor([1.0, 0.5]).cos(), torch.tensor([1.0, 0.5]).sin()  # position 2
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin])
    close(rotated(r, x, 2)[0], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_are_rotated_in_fp32_and_rounded_once(dtype):
    x = keys(num_rows=5, dtype=dtype)
    at = (0, 1, 700, 1500, 3999)
    out = rotated(rope(), x, *at)
    assert out.dtype == dtype
    assert torch.equal(out, rotated(rope(), x.float(), *at).to(dtype))


# --- placing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-llama3", "llama-yarn", "phi3-partial", "qwen3"])
@pytest.mark.parametrize("position", [0, 9, 700])
def test_what_is_placed_and_rotated_back_is_what_was_stored(family, position, make_bench):
    bench = make_bench(family)
    model, arena, span = bench.model, bench.model.new_arena(800), Span(23, 750)
    stored = bench.garbage(bench.chunks(30)[0])
    place_(arena, model.rope, span, position, stored)
    slots = slice(span.start + position, span.start + position + 30)
    at = torch.arange(position, position + 30)
    r = model.rope
    back = r.shift(arena.keys[:, :, slots], -at)[..., : r.rotary_dim] / r.scaling
    close(back, stored.keys[..., : r.rotary_dim], atol=1e-3)
    assert torch.equal(arena.keys[:, :, slots][..., r.rotary_dim :], stored.keys[..., r.rotary_dim :])
    assert torch.equal(arena.values[:, :, slots], stored.values)
    for held in (arena.keys, arena.values):  # and nothing else was written
        held[:, :, slots] = 0
        assert not held.any()


def test_placing_what_was_captured_gives_the_slots_it_was_captured_from(family, make_model):
    model = make_model(family)
    here, there, span = model.new_arena(60), model.new_arena(60), Span(5, 50)
    ids = torch.arange(40, 80)
    capture = CaptureKV()
    model.forward([RowGroup(span, ids, torch.arange(40), observer=capture)], here)
    place_(there, model.rope, span, 0, capture.chunk_kv())
    assert torch.equal(there.keys, here.keys) and torch.equal(there.values, here.values)


def test_placing_converts_to_the_arenas_dtype():
    model_rope = rope()
    arena = KVArena(1, 2, HEAD_DIM, 10, torch.bfloat16, torch.device("cpu"))
    kv = ChunkKV(keys(1, 4)[None], keys(2, 4)[None])
    place_(arena, model_rope, Span(0, 10), 3, kv)
    expected = model_rope.rotate(kv.keys[0].to(torch.bfloat16), *model_rope.tables(torch.arange(3, 7)))
    assert torch.equal(arena.keys[0, :, 3:7], expected)
    assert torch.equal(arena.values[0, :, 3:7], kv.values[0].to(torch.bfloat16))
