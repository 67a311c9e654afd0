"""Where stored KV lies before a timed request: on the device, in host memory, or cold on disk, with or without a codec.

A tier is named `device`, `host` or `disk`, with a codec behind a dash: `disk-int8`. Knows nothing of what is timed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from time import perf_counter

from fusionrag.config import EngineConfig, StoreConfig
from fusionrag.cost import DecoderSize
from fusionrag.engine import Engine
from fusionrag.errors import ConfigError
from fusionrag.loading import NUM_READERS
from fusionrag.model import LanguageModel
from fusionrag.store import open_store
from fusionrag.store.codec import CODECS, KVShape, layout
from scripts.bench.floor import Ceilings

PLACES = ("device", "host", "disk")


@dataclass(frozen=True)
class Tier:
    """`codec` is the store's knob kv_codec."""

    place: str
    codec: str

    @property
    def name(self) -> str:
        return self.place if self.codec == "none" else f"{self.place}-{self.codec}"

    def num_bytes(self, model: DecoderSize, chunk_lengths: Sequence[int]) -> int:
        """Of chunks of these lengths, as they are stored."""
        s = model.shape
        shapes = [KVShape(s.num_layers, s.num_kv_heads, length, s.head_dim) for length in chunk_lengths]
        tensors = [t for shape in shapes for t in layout(self.codec, model.dtype, shape)]
        return sum(prod(t.shape) * t.dtype.itemsize for t in tensors)

    def engine(
        self, model: LanguageModel, folder: Path, store: StoreConfig, config: EngineConfig, num_bytes: int
    ) -> Engine:
        """One whose stored KV, of at most `num_bytes`, comes from this tier."""
        host_bytes = 0 if self.place == "disk" else 2 * num_bytes  # some room is lost between objects
        config = replace(config, route="reuse")  # a method is timed even where another one would be faster
        store = replace(store, kv_codec=self.codec, host_tier_bytes=host_bytes)
        opened = open_store(folder / self.name, store, for_gpu=model.device.type == "cuda")
        return Engine(model, opened, config, self.codec, 2 * num_bytes if self.place == "device" else 0)

    def rate(self, ceilings: Ceilings, disk_bytes_per_s: float | None) -> float:
        """Bytes/s at which this tier can give KV at most."""
        if self.place == "disk":
            return disk_bytes_per_s or ceilings.link_bytes_per_s
        return ceilings.link_bytes_per_s if self.place == "host" else ceilings.memory_bytes_per_s / 2


def parse_tier(text: str) -> Tier:
    """'disk-int8' → int8 on disk. Raises ConfigError."""
    place, _, codec = text.strip().partition("-")
    if place not in PLACES or codec not in ("", *CODECS):
        raise ConfigError("tiers", f"{text!r}: expected {', '.join(PLACES)}, with a codec as in disk-int8")
    return Tier(place, codec or "none")


def forget_files(folder: Path) -> None:
    """Drops the files of a folder from the page cache, so that the next read is of the drive."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes_per_s(folder: Path) -> float | None:
    """Cold reads of all files of a folder, several at a time; None where there are none."""
    paths = list(folder.rglob("*.safetensors"))
    if not paths:
        return None
    forget_files(folder)
    begin = perf_counter()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        sizes = list(pool.map(lambda path: len(path.read_bytes()), paths))
    return sum(sizes) / (perf_counter() - begin)
