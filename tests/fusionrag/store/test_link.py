"""Copies over the link: which bytes move, in one call or one by one, and what happens when the driver refuses."""

from __future__ import annotations

import ctypes
import logging

import numpy as np
import pytest
import torch

from fusionrag.store import link
from fusionrag.store.link import LayerCopies, LayeredBytes

SIZES = [(5, 7), (0, 16), (33, 1)]  # bytes of head and layer of each object
NUM_LAYERS = 6
NOT_SUPPORTED = 801


class FakeLibrary:
    """A driver whose device is host memory. many, one: what its two functions return; 0: they copy.

    many is None for an older driver, which has no such function.
    """

    def __init__(self, many: int | None = 0, one: int = 0) -> None:
        self.calls: list[str] = []

        def copy_one(target, source, size, stream):
            self.calls.append("one")
            if not one:
                ctypes.memmove(target, source, size)
            return one

        def copy_many(targets, sources, sizes, count, attributes, first, num_attributes, failed, stream):
            self.calls.append("many")
            assert attributes._obj.order == link.IN_STREAM_ORDER and first._obj.value == 0
            assert num_attributes.value == 1 and stream.value == 7
            if not many:
                lists = ((ctypes.c_uint64 * count.value).from_address(p.value) for p in (targets, sources, sizes))
                for target, source, size in zip(*lists, strict=True):
                    ctypes.memmove(target, source, size)
            return many

        self.cuMemcpyHtoDAsync_v2 = copy_one
        if many is not None:
            self.cuMemcpyBatchAsync = copy_many


@pytest.fixture
def use(monkeypatch):
    def use(library):
        driver = link._Driver(library)
        monkeypatch.setattr(link, "_driver", lambda: driver)
        return library

    return use


def objects():
    """Sources full of noise, targets full of zeros, and the copies between them."""
    draw = np.random.default_rng(0)
    sources = [draw.integers(1, 255, head + NUM_LAYERS * layer, dtype=np.uint8) for head, layer in SIZES]
    targets = [np.zeros_like(s) for s in sources]
    layered = (
        LayeredBytes(t.ctypes.data, s.ctypes.data, *size) for t, s, size in zip(targets, sources, SIZES, strict=True)
    )
    return sources, targets, LayerCopies(list(layered))


@pytest.mark.parametrize("many", [0, None, NOT_SUPPORTED])
def test_a_run_of_layers_moves_its_own_bytes_and_no_others(use, many):
    use(FakeLibrary(many))
    sources, targets, copies = objects()
    moved = 0
    for layers in (slice(0, 1), slice(1, 4), slice(4, NUM_LAYERS)):
        copies.queue(layers, 7)
        for source, target, (head, layer) in zip(sources, targets, SIZES, strict=True):
            end = head + layers.stop * layer  # heads come with layer 0
            assert (target[:end] == source[:end]).all() and not target[end:].any()
            moved += end
    assert moved


def test_a_driver_that_takes_many_copies_gets_them_in_one_call(use):
    library = use(FakeLibrary())
    *_, copies = objects()
    copies.queue(slice(0, 2), 7)
    assert library.calls == ["many"]


def test_a_driver_that_refuses_many_at_once_gets_them_one_by_one_and_is_not_asked_again(use, caplog):
    library = use(FakeLibrary(NOT_SUPPORTED))
    *_, copies = objects()
    with caplog.at_level(logging.WARNING):
        copies.queue(slice(0, 2), 7)
        copies.queue(slice(2, 3), 7)
    assert library.calls == ["many"] + ["one"] * 2 * len(SIZES)
    assert [str(NOT_SUPPORTED) in r.message for r in caplog.records] == [True]


def test_a_copy_that_fails_is_told_with_the_drivers_number(use):
    use(FakeLibrary(None, one=719))
    *_, copies = objects()
    with pytest.raises(RuntimeError, match=r"12 bytes .* error 719"):
        copies.queue(slice(0, 1), 7)


def test_no_objects_are_no_call(use):
    library = use(FakeLibrary())
    LayerCopies([]).queue(slice(0, 3), 7)
    assert library.calls == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bytes_cross_to_a_gpu_from_locked_and_from_ordinary_memory():
    stream = torch.cuda.Stream()
    for is_locked in (True, False):
        source = torch.randint(0, 255, (3, 100_003), dtype=torch.uint8)
        source = source.pin_memory() if is_locked else source
        target = torch.zeros(source.shape, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        rows = [LayeredBytes(t.data_ptr(), s.data_ptr(), 3, 10_000) for t, s in zip(target, source, strict=True)]
        copies = LayerCopies(rows)
        for layers in (slice(0, 4), slice(4, 10)):
            copies.queue(layers, stream.cuda_stream)
        stream.synchronize()
        assert torch.equal(target.cpu(), source)
    assert link._driver()._many is not None or not hasattr(ctypes.CDLL("libcuda.so.1"), "cuMemcpyBatchAsync")
