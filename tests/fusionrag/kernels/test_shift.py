"""shift_ against the definition in fp64: every slot moves by its chunk's vector, and nothing else moves."""

from __future__ import annotations

import pytest
import torch

from fusionrag.kernels.shift import shift_
from fusionrag.rope import Rope


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 200])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (80, 80), (128, 128), (80, 32), (8, 2)])
def test_every_slot_moves_by_its_chunks_shift(device, dtype, num_tokens, head_dim, rotary_dim):
    draw, num_chunks, first_slot = torch.Generator().manual_seed(num_tokens), 5, 7
    rope = Rope(torch.rand(rotary_dim // 2, generator=draw).to(device), scaling=1.25)
    keys, values = (torch.randn(3, 300, head_dim, generator=draw).to(device, dtype) for _ in range(2))
    shifts = [torch.randn(3, num_chunks, head_dim, generator=draw).to(device) for _ in range(2)]
    chunk_of = torch.randint(num_chunks, (num_tokens,), generator=draw).sort().values.to(device)
    cos, sin = rope.tables(torch.arange(40, 40 + num_tokens, device=device))
    before, slots = [keys.clone(), values.clone()], slice(first_slot, first_slot + num_tokens)
    shift_(keys, values, torch.tensor([first_slot], device=device), chunk_of, *shifts, cos, sin)

    half, moved = rotary_dim // 2, [s[:, chunk_of].double() for s in shifts]
    first, second = moved[0][..., :half], moved[0][..., half:rotary_dim]
    rotated = [first * cos.double() - second * sin.double(), second * cos.double() + first * sin.double()]
    moved[0] = torch.cat([*rotated, moved[0][..., rotary_dim:]], dim=-1)
    for now, was, by in zip((keys, values), before, moved, strict=True):
        bound = 4 * torch.finfo(dtype).eps  # the shift is rounded, then the sum
        torch.testing.assert_close(now[:, slots].double(), was[:, slots].double() + by, rtol=bound, atol=4 * bound)
        assert torch.equal(now[:, :first_slot], was[:, :first_slot])
        assert torch.equal(now[:, slots.stop :], was[:, slots.stop :])


def test_slots_of_no_chunk_stay_as_they_are(device):
    keys, values = torch.zeros(2, 100, 16, device=device), torch.zeros(2, 100, 16, device=device)
    chunk_of = torch.tensor([-1, -1, 0, 0, -1, 1, -1, -1], device=device)
    shifts = [torch.ones(2, 2, 16, device=device) for _ in range(2)]
    tables = Rope(torch.ones(8, device=device)).tables(torch.zeros(8, device=device))
    shift_(keys, values, torch.tensor([94], device=device), chunk_of, *shifts, *tables)  # the last ones are not there
    for found in (keys, values):
        assert found[0].any(1).nonzero()[:, 0].tolist() == [96, 97, 99]


def test_nothing_moves_where_there_is_no_chunk(device):
    keys = torch.zeros(2, 100, 16, device=device)
    tables = Rope(torch.ones(8, device=device)).tables(torch.zeros(3, device=device))
    shifts = [torch.ones(2, 1, 16, device=device)] * 2
    shift_(keys, keys, torch.tensor([5], device=device), torch.full((3,), -1, device=device), *shifts, *tables)
    assert not keys.any()
