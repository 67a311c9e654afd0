"""Moments and the time between them."""

from __future__ import annotations

import time

import pytest
import torch

from fusionrag.clock import Mark


def test_on_a_cpu_the_time_between_two_moments_is_that_of_the_host():
    first = Mark.now(torch.device("cpu"))
    time.sleep(0.02)
    second = Mark.now(torch.device("cpu"))
    assert first.event is second.event is None
    assert first.ms_until(second) == pytest.approx((second.seconds - first.seconds) * 1e3)
    assert 20 <= first.ms_until(second) == -second.ms_until(first)
    assert first.ms_until(first) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_that_of_the_device_and_the_host_does_not_wait():
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    first = Mark.now(device)
    for _ in range(20):
        a = (a @ a).tanh()
    second = Mark.now(device)
    queued_ms = (second.seconds - first.seconds) * 1e3
    torch.cuda.synchronize()
    assert first.ms_until(second) > 2 * queued_ms
