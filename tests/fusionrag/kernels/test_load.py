"""load_ against decoding, rotating and indexing one by one."""

from __future__ import annotations

import pytest
import torch

from fusionrag.kernels.load import ChunkBytes, load_, load_reference_, load_table
from fusionrag.rope import Rope
from fusionrag.store.codec import CODECS, decode, encode
from fusionrag.types import ChunkKV


class Case:
    """Chunks of some lengths, encoded into one buffer of bytes, and an arena of NaNs to load them into."""

    def __init__(
        self,
        lengths,
        codec,
        dtype=torch.float32,
        arena_dtype=None,
        head_dim=16,
        rotary_dim=None,
        first_layer=0,
        device="cpu",
    ):
        draw = torch.Generator().manual_seed(len(lengths))
        num_layers, num_heads = 3, 2
        self.codec, self.dtype, self.device = codec, dtype, device
        self.rope = Rope(torch.rand((rotary_dim or head_dim) // 2, generator=draw).to(device), scaling=1.25)
        self.chunks, self.kv, parts, at, slot = [], [], [], 16, 2
        for i, num_tokens in enumerate(lengths):
            shape = num_layers, num_heads, num_tokens, head_dim
            kv = ChunkKV(*(torch.randn(shape, generator=draw).to(dtype) for _ in range(2)))
            tensors = encode(kv, codec)
            self.kv.append(decode(tensors, codec, torch.float32))
            offsets = {}
            for name, tensor in tensors.items():
                data = tensor.reshape(-1).view(torch.uint8)
                offsets[name] = at
                parts.append((at, data))
                at = -(-(at + len(data)) // 16) * 16 + 32
            self.chunks.append(
                ChunkBytes(
                    offsets["kv"],
                    offsets.get("key_scales", 0),
                    offsets.get("value_scales", 0),
                    num_tokens,
                    slot,
                    7 + 100 * i,
                )
            )
            slot += num_tokens + 3
        self.source = torch.full((at,), 255, dtype=torch.uint8)
        for begin, data in parts:
            self.source[begin : begin + len(data)] = data
        self.source, self.first_layer = self.source.to(device), first_layer
        shape = num_layers - first_layer, num_heads, slot, head_dim
        self.arena = [torch.full(shape, float("nan"), dtype=arena_dtype or dtype, device=device) for _ in range(2)]

    def load(self, load=load_):
        table = load_table(self.chunks, torch.device(self.device))
        most = max((c.num_tokens for c in self.chunks), default=0)
        rope = self.rope.inv_freq, self.rope.scaling
        load(self.source, table, most, self.codec, self.dtype, *rope, *self.arena, self.first_layer)

    def expected(self):
        """(keys, values) of the arena in fp64, NaN where nothing belongs."""
        keys, values = (torch.full(x.shape, float("nan"), dtype=torch.float64) for x in self.arena)
        for chunk, kv in zip(self.chunks, self.kv, strict=True):
            positions = torch.arange(chunk.position, chunk.position + chunk.num_tokens, device=self.device)
            cos, sin = (x.double().cpu() for x in self.rope.tables(positions))
            half, own = cos.shape[1], kv.keys[self.first_layer :].double()
            first, second = own[..., :half], own[..., half : 2 * half]
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin, own[..., 2 * half :]], dim=-1)
            slots = slice(chunk.slot, chunk.slot + chunk.num_tokens)
            keys[:, :, slots], values[:, :, slots] = turned, kv.values[self.first_layer :].double()
        return keys, values


def check(case, load=load_):
    case.load(load)
    rounding = torch.finfo(case.arena[0].dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    for found, expected in zip(case.arena, case.expected(), strict=True):
        torch.testing.assert_close(found.double().cpu(), expected, rtol=rounding, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("lengths", [[1], [33], [5, 64, 31], [100, 1, 32]], ids=str)
def test_chunks_land_rotated_at_their_slots_and_nothing_else_is_touched(device, codec, lengths):
    check(Case(lengths, codec, device=device))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(8, 8), (64, 64), (80, 80), (96, 96), (128, 128), (80, 32), (256, 64)]
)
def test_every_head_dim_and_partial_rotation(device, codec, head_dim, rotary_dim):
    check(Case([40, 7], codec, head_dim=head_dim, rotary_dim=rotary_dim, device=device))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
def test_every_stored_and_every_arena_dtype(device, dtype, codec, stored):
    stored = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[stored]
    check(Case([40, 7], codec, stored, dtype, head_dim=32, device=device))


@pytest.mark.parametrize("codec", CODECS)
def test_a_block_of_layers_is_loaded_from_its_own_bytes(device, codec):
    check(Case([40, 7], codec, first_layer=1, device=device))


@pytest.mark.parametrize("codec", CODECS)
def test_numbers_are_rounded_once(kernel_device, codec):
    """The kernel and its reference agree to the last bit but for the order of two multiply-adds."""
    ours, plain = (Case([70, 7], codec, torch.float16, head_dim=64, device=kernel_device) for _ in range(2))
    ours.load()
    plain.load(load_reference_)
    for x, y in zip(ours.arena, plain.arena, strict=True):
        different = (x != y) & ~(x.isnan() & y.isnan())
        assert different.float().mean() < 0.01
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3, equal_nan=True)


def test_the_arenas_strides_are_free(device):
    case, plain = Case([40, 7], "int8", device=device), Case([40, 7], "int8", device=device)
    case.arena = [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in case.arena]
    case.load()
    plain.load()
    for x, y in zip(case.arena, plain.arena, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_no_chunks_are_nothing_to_do(device):
    case = Case([], "int8", device=device)
    case.load()
    assert all(x.isnan().all() for x in case.arena)
