"""Stored KV in device memory, here in a CPU's: what is kept, what makes room, and what is never given out twice."""

from __future__ import annotations

import gc

import pytest
import torch

from fusionrag.store.codec import ALIGNMENT, CODECS, EncodedKV, KVShape, layout
from fusionrag.store.device import DeviceTier

CPU = torch.device("cpu")
SHAPE = KVShape(num_layers=3, num_kv_heads=2, num_tokens=5, head_dim=8)


def payload(seed: int = 0, codec: str = "none", shape: KVShape = SHAPE) -> EncodedKV:
    """Random bytes as the codec lays them out; decoding them is nobody's business here."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for tensor in layout(codec, torch.float32, shape):
        size = torch.empty(tensor.shape, dtype=tensor.dtype).nbytes
        tensors[tensor.name] = torch.randint(0, 255, (size,), dtype=torch.uint8, generator=draw)
        tensors[tensor.name] = tensors[tensor.name].view(tensor.dtype).view(tensor.shape)
    return EncodedKV(codec, torch.float32, tensors)


def payload_as_it_is(encoded: EncodedKV) -> EncodedKV:
    return encoded


def size_of(encoded: EncodedKV) -> int:
    return sum(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in encoded.tensors.values())


ONE = size_of(payload())


def put(tier: DeviceTier, *seeds: int):
    """Reserves and copies; digests are the seeds."""
    kept = tier.reserve([(payload(seed), str(seed)) for seed in seeds])
    for kv, seed in zip(kept, seeds, strict=True):
        kv.copy_layers_(payload(seed), slice(0, SHAPE.num_layers))
    return kept


def bytes_at(kv, name: str, layer: int, num_bytes: int) -> torch.Tensor:
    start = kv.offset(name) + layer * kv.packing.layer_bytes[name]
    return kv.buffer[start : start + num_bytes]


def packed(encoded: EncodedKV, gap: int = 0) -> EncodedKV:
    """The same in one block of memory, as it is read from a file; `gap` bytes before "kv"."""
    pieces, at = {}, 8
    block = torch.zeros(at + encoded.num_bytes + gap, dtype=torch.uint8)
    for name, tensor in encoded.tensors.items():
        at += gap if name == "kv" else 0
        pieces[name] = block[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        pieces[name].copy_(tensor)
        at += tensor.nbytes
    return EncodedKV(encoded.codec, encoded.dtype, pieces)


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_in_one_block_are_known_as_such(codec):
    encoded = payload(3, codec)
    one = packed(encoded).packed
    assert one is not None
    assert one.equal(torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in encoded.tensors.values()]))
    if len(encoded.tensors) > 1:
        assert encoded.packed is None and packed(encoded, gap=8).packed is None


@pytest.mark.parametrize("arranged", [payload_as_it_is, packed], ids=["apart", "packed"])
@pytest.mark.parametrize("codec", CODECS)
def test_every_layer_of_every_tensor_is_where_the_offsets_say(codec, arranged):
    encoded = arranged(payload(3, codec))
    (kv,) = DeviceTier(1 << 20, CPU).reserve([(encoded, None)])
    for layers in (slice(2, 3), slice(0, 2)):  # in any order
        kv.copy_layers_(encoded, layers)
    for name, tensor in encoded.tensors.items():
        for layer in range(SHAPE.num_layers):
            expected = tensor[layer].contiguous().view(-1).view(torch.uint8)
            assert bytes_at(kv, name, layer, len(expected)).equal(expected)
        assert kv.offset(name) % (16 if name == "kv" else 4) == 0
    assert (kv.num_tokens, kv.codec, kv.dtype) == (SHAPE.num_tokens, codec, torch.float32)


def test_what_was_put_is_found_by_its_digest_and_lies_in_one_buffer():
    tier = DeviceTier(4 * ONE, CPU)
    first, second = put(tier, 1, 2)
    assert tier.get("1") is first and tier.get("2") is second and tier.get("3") is None
    assert first.buffer is second.buffer
    tier.discard("1")
    assert tier.get("1") is None
    tier.discard("1")  # again: no effect


def test_the_least_recently_used_makes_room():
    tier = DeviceTier(3 * ONE, CPU)
    put(tier, 1, 2, 3)
    tier.get("1")
    put(tier, 4)
    assert [tier.get(d) is not None for d in "1234"] == [True, False, True, True]


def test_bytes_that_somebody_holds_are_not_given_out():
    tier = DeviceTier(2 * ONE, CPU)
    (held,) = put(tier, 1)
    before = held.buffer[held.start : held.start + ONE].clone()
    put(tier, 2)
    for seed in range(3, 9):  # each evicts what it can
        put(tier, seed)
    assert tier.get("1") is None, "it was evicted"
    assert held.buffer[held.start : held.start + ONE].equal(before), "but it is still there"
    assert tier.num_free <= ONE
    del held
    tier.discard("8")
    assert tier.num_free == 2 * ONE


def test_what_finds_no_room_shares_one_buffer_of_its_own():
    tier = DeviceTier(2 * ONE, CPU)
    held = put(tier, *range(5))
    inside, outside = held[:2], held[2:]
    assert len({kv.buffer.data_ptr() for kv in inside}) == 1
    assert len({kv.buffer.data_ptr() for kv in outside}) == 1
    assert inside[0].buffer.data_ptr() != outside[0].buffer.data_ptr()
    assert outside[0].buffer.nbytes == 3 * ONE
    assert [tier.get(str(i)) is not None for i in range(5)] == [True, True, False, False, False]
    for seed, kv in enumerate(held):
        assert bytes_at(kv, "kv", 1, 64).equal(payload(seed).tensors["kv"][1].reshape(-1).view(torch.uint8)[:64])


@pytest.mark.parametrize("capacity", [0, ONE - 1])
def test_a_tier_that_is_too_small_keeps_nothing_and_serves_all_the_same(capacity):
    tier = DeviceTier(capacity, CPU)
    (kv,) = put(tier, 1)
    assert tier.get("1") is None
    assert bytes_at(kv, "kv", 0, 64).equal(payload(1).tensors["kv"][0].reshape(-1).view(torch.uint8)[:64])


def test_what_has_no_name_is_not_kept_for_longer_than_it_is_held():
    tier = DeviceTier(2 * ONE, CPU)
    (kv,) = tier.reserve([(payload(), None)])
    assert tier.num_free == ONE
    del kv
    assert tier.num_free == 2 * ONE


def test_objects_in_a_cycle_come_back_when_python_collects_them():
    tier = DeviceTier(2 * ONE, CPU)
    old = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(100):
            cycle = [*tier.reserve([(payload(), None)])]
            cycle.append(cycle)
    finally:
        gc.set_threshold(*old)
    del cycle
    gc.collect()
    assert tier.num_free == 2 * ONE


def test_memory_outside_the_tier_is_used_again_when_nobody_holds_what_was_there():
    tier = DeviceTier(0, CPU)
    (first,) = put(tier, 1)
    tier.reserve([])
    (second,) = put(tier, 2)
    assert first.buffer.data_ptr() != second.buffer.data_ptr(), "somebody holds the first"
    memory = second.buffer
    del second
    (third,) = put(tier, 3)
    assert third.buffer.data_ptr() == memory.data_ptr()
    del third
    larger = put(tier, 4, 5, 6)
    assert larger[0].buffer.data_ptr() != memory.data_ptr() and len(larger[0].buffer) >= 3 * ONE
    for kv, seed in ((first, 1), *zip(larger, (4, 5, 6), strict=True)):
        assert bytes_at(kv, "kv", 0, 16).equal(payload(seed).tensors["kv"].view(-1).view(torch.uint8)[:16])
