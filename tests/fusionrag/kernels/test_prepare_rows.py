"""prepare_rows_ against `Rope.rotate` and plain indexing."""

from __future__ import annotations

import pytest
import torch

from fusionrag.kernels.prepare_rows import prepare_rows_
from fusionrag.rope import Rope


def problem(num_rows, num_heads=6, num_kv_heads=2, head_dim=16, rotary_dim=16, dtype=torch.float32, device="cpu"):
    draw = torch.Generator().manual_seed(num_rows)
    rope = Rope(torch.rand(rotary_dim // 2, generator=draw).to(device), scaling=1.25)
    slots = torch.randperm(3 * num_rows + 2, generator=draw)[:num_rows].to(device)
    rows = [
        torch.randn(num_rows, heads, head_dim, generator=draw).to(device, dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]
    arena = [torch.full((num_kv_heads, 3 * num_rows + 2, head_dim), float("nan")).to(device, dtype) for _ in range(2)]
    return rope, slots, rows, arena


def expected(cos, sin, x):
    """In fp64."""
    half = cos.shape[1]
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    first, second = x[..., :half].double(), x[..., half : 2 * half].double()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :].double()], dim=-1)


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (6, 2), (7, 1)])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (80, 80), (96, 96), (128, 128), (80, 32), (8, 2)])
def test_rows_are_rotated_and_written_at_their_slots(
    device, dtype, num_rows, num_heads, num_kv_heads, head_dim, rotary_dim
):
    rope, slots, (queries, keys, values), arena = problem(
        num_rows, num_heads, num_kv_heads, head_dim, rotary_dim, dtype, device
    )
    tables = rope.tables(torch.arange(num_rows, device=device) * 3)
    before = [x.clone() for x in (queries, keys, values)]
    prepare_rows_(queries, keys, values, *tables, slots, *arena)
    eps = torch.finfo(dtype).eps
    close = {"rtol": eps, "atol": 8 * torch.finfo(torch.float32).eps}
    torch.testing.assert_close(queries.double(), expected(*tables, before[0]), **close)
    torch.testing.assert_close(arena[0][:, slots].transpose(0, 1).double(), expected(*tables, before[1]), **close)
    assert torch.equal(arena[1][:, slots].transpose(0, 1), before[2])
    assert torch.equal(keys, before[1]) and torch.equal(values, before[2])
    untouched = torch.ones(arena[0].shape[1], dtype=torch.bool, device=device)
    untouched[slots] = False
    assert all(x[:, untouched].isnan().all() for x in arena)


def test_strides_are_free(device):
    """Queries, keys and values may be parts of one projection's output, and the arena's heads may lie anywhere."""
    rope, slots, rows, arena = problem(20, device=device)
    fused = torch.cat(rows, dim=1)
    parts = fused[:, :6], fused[:, 6:8], fused[:, 8:]
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arena]
    tables = rope.tables(torch.arange(20, device=device))
    prepare_rows_(*parts, *tables, slots, *apart)
    prepare_rows_(*rows, *tables, slots, *arena)
    assert torch.equal(parts[0], rows[0])
    for x, y in zip(apart, arena, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_prepare_is_nothing_to_do(device):
    rope, slots, rows, arena = problem(0, device=device)
    prepare_rows_(*rows, *rope.tables(slots), slots, *arena)
    assert all(x.isnan().all() for x in arena)


def test_a_row_without_a_slot_is_not_written(kernel_device):
    rope, slots, rows, arena = problem(20, device=kernel_device)
    kept = slots[3].item()
    slots[[2, 3, 19]] = -1
    prepare_rows_(*rows, *rope.tables(torch.arange(20, device=kernel_device)), slots, *arena)
    assert all((~x.isnan()).all(2).sum(1).eq(17).all() and x[:, kept].isnan().all() for x in arena)
