"""What the GPU did with a request's time: two parts around the last scoring kernel, kinds by name, and the gaps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fusionrag.kernels
from scripts.bench.device_time import IDLE, REST, DeviceEvent, by_kind, device_time, kind_of, parts
from scripts.cli import main

SCORES, PRODUCT = "_attention_mass_kernel", "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"
COPIED = "Memcpy HtoD (Pinned -> Device)"


def events(*rows):
    return [DeviceEvent(*row) for row in rows]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_attend_kernel", "attention"),
        ("_rows_attention_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        (SCORES, "importance"),
        ("_load_kernel", "KV into the span"),
        ("_silu_mul_kernel", "silu(gate) · up"),
        ("_add_norm_kernel", "norm, rotation, correction"),
        ("void at::native::vectorized_layer_norm_kernel<...>", "norm, rotation, correction"),
        (PRODUCT, "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("_one_row_kernel", "matrix products"),
        ("void at::native::vectorized_elementwise_kernel<...>", REST),
    ],
)
def test_kernels_are_told_apart_by_name(name, kind):
    assert kind_of(name) == kind


def test_every_kernel_of_ours_has_a_kind():
    """A new kernel must not end among the others unnoticed."""
    folder = Path(fusionrag.kernels.__file__).parent
    found = [re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M) for path in folder.glob("*.py")]
    names = [name for names in found for name in names]
    assert len(names) > 10
    assert {n: kind_of(n) for n in names if kind_of(n) == REST} == {}


def test_the_first_part_ends_with_the_last_scoring_kernel():
    found = parts(events((PRODUCT, 2, 3), (SCORES, 3, 4), (SCORES, 6, 7), (PRODUCT, 7.5, 9), (COPIED, 0, 20)))
    assert [(begin, end, len(kernels)) for begin, end, kernels in found] == [(0, 7, 3), (7, 9, 1)]


def test_a_request_that_scores_nothing_has_one_part():
    assert [part[:2] for part in parts(events((PRODUCT, 1, 4)))] == [(0, 4)]
    assert parts([]) == [(0, 0, [])]


def test_times_add_up_to_the_part_where_nothing_overlaps():
    begin, end, kernels = part = parts(events((PRODUCT, 1, 4), ("other", 4, 4.5), (PRODUCT, 6, 8)))[0]
    found = by_kind(part)
    assert found == {"matrix products": 5, REST: 0.5, IDLE: 2.5}
    assert sum(found.values()) == end - begin and len(kernels) == 3


def test_a_gap_that_another_stream_fills_is_none():
    assert by_kind(parts(events((PRODUCT, 0, 2), ("_load_kernel", 1, 6), (PRODUCT, 5, 7)))[0])[IDLE] == 0


def test_without_a_gpu_the_flag_is_refused_by_name(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "ttft", "--shape", "tiny", "--device-time"]) == 2
    assert "device_time: " in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_products_are_seen_and_waiting_is_not_called_work():
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def work():
        for _ in range(3):
            a @ a
        torch.cuda.synchronize()

    (found,) = device_time(work)
    assert found["matrix products"] > 0 and found[IDLE] > 0
