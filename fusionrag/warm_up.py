"""A made-up request through every step, before the first real one: on a GPU kernels are compiled when they first run.

What it computes is thrown away. Invariant: no store on disk, no tier and no rate of the router is touched.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from fusionrag.config import ReuseConfig
from fusionrag.engine import Engine
from fusionrag.live_request import EngineRequest
from fusionrag.preprocess.job import PreprocessJob
from fusionrag.sampling import SamplingParams
from fusionrag.store import MemoryStore
from fusionrag.types import PromptChunk, PromptPlan, Segment, SegmentKind

NUM_CHUNKS = 4
CHUNK_TOKENS = 512  # shorter where the model or the arena has no room
TAIL_TOKENS = 32
NUM_GENERATED = 3  # the second one is a decode pass


def warm_up(engine: Engine, prefix_ids: tuple[int, ...], reuse: ReuseConfig) -> None:
    """The engine must be idle. Takes as long as compiling does, and once that is cached hardly any time."""
    model, store = engine.model, MemoryStore(is_decoded=engine.model.device.type == "cpu")
    room = min(model.max_model_len, engine.arena.num_slots) - len(prefix_ids) - TAIL_TOKENS - NUM_GENERATED
    lengths = [min(CHUNK_TOKENS, room // NUM_CHUNKS)] * NUM_CHUNKS
    if lengths[0] < 1:
        return
    plan = _plan(prefix_ids, lengths, model.shape.vocab_size)
    chunks = [s.chunk for s in plan.chunks if s.chunk is not None]
    names, prefix = engine.prefix(prefix_ids)
    token_ids_of = {c.chunk_id: c.token_ids for c in chunks}
    with engine.rehearsing(store):
        for _ in PreprocessJob(model, store, names, token_ids_of, engine.config, prefix, engine.arena).run(chunks):
            pass
        sampling = SamplingParams(max_tokens=NUM_GENERATED, ignore_eos=True)
        engine.generate(EngineRequest("warm-up", plan, sampling, reuse))


def _plan(prefix_ids: tuple[int, ...], lengths: list[int], vocab_size: int) -> PromptPlan:
    """Chunks of these lengths, of tokens drawn at random, behind the prefix, and a tail."""
    draw = torch.Generator().manual_seed(0)
    ends = torch.tensor([len(prefix_ids), *lengths, TAIL_TOKENS]).cumsum(0).tolist()
    segments = [Segment(SegmentKind.PREFIX, 0, prefix_ids)]
    for i, (start, stop) in enumerate(pairwise(ends)):
        ids = tuple(torch.randint(vocab_size, (stop - start,), generator=draw).tolist())
        if i < len(lengths):
            segments.append(Segment(SegmentKind.CHUNK, start, ids, PromptChunk(f"warm-up {i}", ids, ())))
        else:
            segments.append(Segment(SegmentKind.TAIL, start, ids))
    return PromptPlan(tuple(segments), (0, TAIL_TOKENS))
