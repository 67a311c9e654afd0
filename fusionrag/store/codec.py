"""How a chunk's KV becomes tensors on disk and back.

    none     the model's dtype, bit for bit
    float16  half precision; refused when a value does not fit
    int8     symmetric; keys one scale per (layer, head, channel), because a few key channels are far larger than the
             rest; values one scale per (layer, head, token). |error| <= scale / 2 with scale = max |x| / 127
    int4     16 even steps between minimum and maximum of a group: keys 32 tokens of a channel, values 32 channels of a
             token. |error| <= scale / 2 with scale = (max - min) / 15, and the rounding of both to half precision.
             5 bits a number. Channels are paired two to a byte as `kernels.load` says

Error of the packaged model's KV of 1,024 tokens of an encyclopedia, root mean square, relative: int8 keys 0.5 %, values
0.7 %; int4 keys 3.5 %, values 8.1 %.

Knows nothing of files. Invariant: `layout` tells names, dtypes and shapes of what `encode` makes from (codec, dtype,
shape) alone, so that a reader never has to believe a file. The tensor "kv" is (L, 2, G, T, D), [:, 0] the keys and
[:, 1] the values: one layer is one contiguous run of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from fusionrag.errors import StoreError
from fusionrag.kernels.load import INT4_GROUP, dequantize_int4
from fusionrag.types import ChunkKV

CODECS = ("none", "float16", "int8", "int4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ALIGNMENT = 256  # bytes, on a device, of an object, and of its tensors where they are copied one by one
WIDEST_LOAD = 16  # bytes, of a kernel: so much "kv" is aligned wherever it lies

_INT8_MAX = 127
_INT4_MAX = 15


@dataclass(frozen=True)
class KVShape:
    """The sizes (L, G, T, D) of one ChunkKV."""

    num_layers: int
    num_kv_heads: int
    num_tokens: int
    head_dim: int

    @classmethod
    def of(cls, kv: ChunkKV) -> KVShape:
        """Raises StoreError unless keys and values are (L, G, T, D), not empty, of one shape and dtype."""
        keys, values = kv.keys, kv.values
        if keys.dim() != 4 or keys.numel() == 0 or keys.shape != values.shape or keys.dtype != values.dtype:
            found = f"{tuple(keys.shape)} {keys.dtype} and {tuple(values.shape)} {values.dtype}"
            raise StoreError(f"keys and values must both be (L, G, T, D) of one dtype and not empty, got {found}")
        return cls(*keys.shape)


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of an encoded object."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """How an object lies in one run of bytes on a device: where each tensor begins, and the bytes of one of its layers.

    num_bytes: room for it, a multiple of ALIGNMENT.
    as_on_host: the tensors follow each other without gaps, as in host memory, so that one copy brings several.
    """

    starts: Mapping[str, int]
    layer_bytes: Mapping[str, int]
    num_bytes: int
    as_on_host: bool


@dataclass(frozen=True)
class EncodedKV:
    """One chunk's KV as its codec keeps it. Immutable and shared (I4), as the `ChunkKV` that it stands for.

    tensors: contiguous, on one device, as `layout(codec, dtype, shape)` names them.
    """

    codec: str
    dtype: torch.dtype  # of the decoded KV
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def plain(cls, kv: ChunkKV) -> EncodedKV:
        """A copy of `kv` without a codec, on its device."""
        return cls("none", kv.keys.dtype, {"kv": torch.stack((kv.keys, kv.values), dim=1)})

    @cached_property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def num_tokens(self) -> int:
        return self.tensors["kv"].shape[3]

    @cached_property
    def packing(self) -> Packing:
        """How it lies on a device: as on the host where that leaves "kv" aligned for the kernel, else each aligned."""
        sizes = [t.nbytes for t in self.tensors.values()]
        as_on_host = self.packed is not None and (self.num_bytes - sizes[-1]) % WIDEST_LOAD == 0
        if not as_on_host:
            sizes = [_aligned(size) for size in sizes]
        *starts, end = accumulate(sizes, initial=0)
        layer_bytes = {name: t.nbytes // t.shape[0] for name, t in self.tensors.items()}
        return Packing(dict(zip(self.tensors, starts, strict=True)), layer_bytes, _aligned(end), as_on_host)

    @cached_property
    def bytes_of_layers(self) -> Mapping[str, torch.Tensor]:
        """The tensors as uint8 (L, bytes of a layer): views, for copying runs of layers."""
        return {name: t.view(t.shape[0], -1).view(torch.uint8) for name, t in self.tensors.items()}

    @cached_property
    def packed(self) -> torch.Tensor | None:
        """The bytes of all tensors as one, uint8 (n,), "kv" last: a view. None where they do not follow each other."""
        *_, last = tensors = list(self.tensors.values())
        memory, begin = last.untyped_storage(), tensors[0].storage_offset() * tensors[0].itemsize
        ends = accumulate((t.nbytes for t in tensors), initial=begin)
        in_place = (
            t.untyped_storage().data_ptr() == memory.data_ptr() and t.storage_offset() * t.itemsize == end
            for t, end in zip(tensors, ends, strict=False)
        )
        if not all(in_place) or last is not self.tensors["kv"]:
            return None
        return torch.empty(0, dtype=torch.uint8, device=last.device).set_(memory, begin, (self.num_bytes,), (1,))

    @cached_property
    def kv(self) -> ChunkKV:
        """Decoded; decoded once."""
        return decode(self.tensors, self.codec, self.dtype)

    def decoded(self) -> EncodedKV:
        """The same KV without a codec: what is decoded once need not be decoded for every request."""
        if self.codec == "none":
            return self
        return EncodedKV.plain(self.kv)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def dtype_named(name: str) -> torch.dtype:
    """'float32', 'bfloat16' or 'float16' → the torch dtype. Raises StoreError for any other name."""
    if name not in DTYPES:
        raise StoreError(f"dtype: KV of dtype {name!r} cannot be stored; one of {', '.join(DTYPES)}")
    return DTYPES[name]


def layout(codec: str, dtype: torch.dtype, shape: KVShape) -> tuple[TensorLayout, ...]:
    """The tensors of an object in the order in which they are written: aligned without padding, "kv" last.

    Raises StoreError for an unknown codec.
    """
    num_layers, num_heads, num_tokens, head_dim = shape.num_layers, shape.num_kv_heads, shape.num_tokens, shape.head_dim
    kv = (num_layers, 2, num_heads, num_tokens, head_dim)
    if codec == "none":
        return (TensorLayout("kv", dtype, kv),)
    if codec == "float16":
        return (TensorLayout("kv", torch.float16, kv),)
    if codec == "int8":
        return (
            TensorLayout("key_scales", torch.float32, (num_layers, num_heads, 1, head_dim)),
            TensorLayout("value_scales", torch.float32, (num_layers, num_heads, num_tokens, 1)),
            TensorLayout("kv", torch.int8, kv),
        )
    if codec == "int4":
        _check_pairs(head_dim)
        token_groups, channel_groups = -(-num_tokens // INT4_GROUP), -(-head_dim // INT4_GROUP)
        return (
            TensorLayout("key_scales", torch.float16, (num_layers, num_heads, 2, token_groups, head_dim)),
            TensorLayout("value_scales", torch.float16, (num_layers, num_heads, 2, num_tokens, channel_groups)),
            TensorLayout("kv", torch.uint8, (*kv[:-1], head_dim // 2)),
        )
    raise _unknown(codec)


def encode(kv: ChunkKV, codec: str) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors as `layout` names them, sharing no memory with `kv`, which may live on any device.

    Raises StoreError for an unknown codec, for keys and values that do not match, and for values the codec cannot hold.
    """
    KVShape.of(kv)
    if codec == "none":
        return {"kv": torch.stack((kv.keys, kv.values), dim=1).cpu()}
    if codec == "float16":
        half = torch.stack((kv.keys, kv.values), dim=1).to(torch.float16)
        if not half.sum(dtype=torch.float32).isfinite():  # one pass; finite halves cannot add up to infinity
            raise StoreError("kv_codec: float16 cannot hold this KV (a value beyond 65504 or not finite); use none")
        return {"kv": half.cpu()}
    if codec == "int8":
        keys, key_scales = _quantize(kv.keys, dim=2)
        values, value_scales = _quantize(kv.values, dim=3)
        return {
            "key_scales": key_scales.cpu(),
            "value_scales": value_scales.cpu(),
            "kv": torch.stack((keys, values), dim=1).cpu(),
        }
    if codec == "int4":
        _check_pairs(kv.keys.shape[3])
        keys, key_scales = _quantize_int4(kv.keys, dim=2)
        values, value_scales = _quantize_int4(kv.values, dim=3)
        low, high = torch.stack((keys, values), dim=1).chunk(2, dim=-1)
        return {"key_scales": key_scales.cpu(), "value_scales": value_scales.cpu(), "kv": (low | high << 4).cpu()}
    raise _unknown(codec)


def decode(tensors: Mapping[str, torch.Tensor], codec: str, dtype: torch.dtype) -> ChunkKV:
    """The inverse of `encode`. Keys and values (L, G, T, D) of `dtype`; each layer of each is contiguous.

    With codec none (and float16 read as float16) they are views of `tensors["kv"]`: nothing is copied.
    """
    kv = tensors["kv"]
    if codec in ("none", "float16"):
        kv = kv.to(dtype)
        return ChunkKV(kv[:, 0], kv[:, 1])
    if codec == "int8":
        return ChunkKV(
            kv[:, 0].float().mul_(tensors["key_scales"]).to(dtype),
            kv[:, 1].float().mul_(tensors["value_scales"]).to(dtype),
        )
    if codec == "int4":
        keys, values = dequantize_int4(kv, tensors["key_scales"], tensors["value_scales"])
        return ChunkKV(keys.to(dtype), values.to(dtype))
    raise _unknown(codec)


def shape_of(codec: str, kv: Sequence[int]) -> KVShape:
    """The sizes of the KV whose tensor "kv" is (L, 2, G, T, D), or (L, 2, G, T, D/2) where two numbers share a byte.

    Raises ValueError where `kv` has another number of sizes.
    """
    num_layers, _, num_heads, num_tokens, width = kv
    return KVShape(num_layers, num_heads, num_tokens, 2 * width if codec == "int4" else width)


def _unknown(codec: str) -> StoreError:
    return StoreError(f"kv_codec: unknown codec {codec!r}; one of {', '.join(CODECS)}")


def _quantize(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 of x's shape and float32 scales of size 1 along `dim`."""
    x = x.float()
    scales = x.abs().amax(dim=dim, keepdim=True) / _INT8_MAX
    if not scales.isfinite().all():
        raise StoreError("kv_codec: int8 cannot hold this KV (a value is not finite); the model's output is broken")
    divisors = torch.where(scales > 0, scales, 1.0)  # a channel of zeros stays zero
    return (x / divisors).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8), scales


def _check_pairs(head_dim: int) -> None:
    if head_dim % 2:
        raise StoreError(f"kv_codec: int4 packs channels in pairs, and head_dim is {head_dim}; use int8")


def _quantize_int4(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 below 16 of x's shape (L, G, T, D); (L, G, 2, …) float16 scales and minima of groups along `dim`."""
    size = x.shape[dim]
    whole = torch.arange(-(-size // INT4_GROUP) * INT4_GROUP, device=x.device).clamp_(max=size - 1)
    grouped = x.float().index_select(dim, whole)  # a last, short group repeats its end
    grouped = grouped.reshape(*x.shape[:dim], -1, INT4_GROUP, *x.shape[dim + 1 :])
    low, high = grouped.amin(dim + 1, keepdim=True), grouped.amax(dim + 1, keepdim=True)
    minima = low.half()
    scales = ((high - minima.float()) / _INT4_MAX).half()
    if not (scales.isfinite().all() and minima.isfinite().all()):
        raise StoreError("kv_codec: int4 cannot hold this KV (a value beyond 65504 or not finite); use none")
    divisors = torch.where(scales > 0, scales, 1.0).float()
    numbers = ((grouped - minima.float()) / divisors).round_().clamp_(0, _INT4_MAX).to(torch.uint8)
    numbers = numbers.flatten(dim, dim + 1).narrow(dim, 0, size)
    return numbers, torch.stack((scales, minima), dim=2).squeeze(dim + 2)
