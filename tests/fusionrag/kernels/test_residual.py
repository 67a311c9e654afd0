"""mean_residual against the definition in fp64, chunk by chunk."""

from __future__ import annotations

import pytest
import torch

from fusionrag.kernels.residual import mean_residual
from fusionrag.rope import Rope


@pytest.mark.parametrize("rows_of", [(3, 0, 40), (16, 17), (1,), (0, 0, 5)])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (80, 80), (128, 128), (80, 32), (8, 2)])
def test_each_chunk_gets_the_mean_of_its_own_rows(device, dtype, rows_of, head_dim, rotary_dim):
    draw, num_rows, weight = torch.Generator().manual_seed(sum(rows_of)), sum(rows_of), 0.7
    rope = Rope(torch.rand(rotary_dim // 2, generator=draw).to(device))
    keys, values = (torch.randn(2, num_rows + 4, head_dim, generator=draw).to(device, dtype) for _ in range(2))
    span = [torch.randn(2, 300, head_dim, generator=draw).to(device, dtype) for _ in range(2)]
    positions = torch.randperm(300, generator=draw)[:num_rows].sort().values.to(device)
    bounds = torch.tensor([0, *rows_of]).cumsum(0).to(device)
    tables = rope.tables(-positions)
    found = mean_residual(keys, values, *span, positions, bounds, *tables, weight)

    back = rope.rotate(span[0][:, positions].double().float(), *tables).double()
    residuals = keys[:, :num_rows].double() - back, values[:, :num_rows].double() - span[1][:, positions].double()
    for mean, residual in zip(found, residuals, strict=True):
        for chunk, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            own = residual[:, begin:end]
            expected = weight * own.mean(1) if end > begin else torch.zeros_like(own[:, 0:0].sum(1))
            torch.testing.assert_close(mean[:, chunk].double(), expected, rtol=1e-4, atol=1e-5)
