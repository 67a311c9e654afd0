"""What `bench kernels` measures: for each kernel the work, its reference, and the best library call for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from fusionrag.kernels.importance import attention_mass, attention_mass_reference
from fusionrag.kernels.load import ChunkBytes, load_, load_reference_, load_table
from fusionrag.kernels.one_row import linear_of_row, linear_of_row_reference, swiglu_of_row, swiglu_of_row_reference
from fusionrag.kernels.prepare_rows import prepare_rows_, prepare_rows_reference_
from fusionrag.kernels.row_plan import RequestRows, RowPlan, plan_rows
from fusionrag.kernels.rows_attention import rows_attention, rows_attention_reference
from fusionrag.kernels.swiglu import silu_mul, silu_mul_reference
from fusionrag.store.codec import CODECS, KVShape, layout
from scripts.bench.kernels import Bench, Shape

CHUNK_TOKENS = 512
QUESTION_ROWS = 40
COPIES = 8  # of a small case's keys and values: together they are larger than the cache
Rows = Iterator[dict[str, Any]]


def rows_cases(bench: Bench, shape: Shape, num_tokens: int) -> Rows:
    """Dense causal attention of all rows by the libraries, then rows attention of some rows."""
    queries, keys, values = _attention_inputs(bench, shape, num_tokens, num_tokens)
    everything = _flops(shape, torch.arange(num_tokens))
    dense = dict(_dense(queries, keys, values))
    best_ms = float("inf")
    for name, work in dense.items():
        try:
            ms = bench.ms(work)
        except RuntimeError as error:  # a backend that does not take this
            yield {"kernel": name, "case": "all rows", "refused": str(error).splitlines()[0][:80]}
            continue
        best_ms = min(best_ms, ms)
        yield bench.row(name, "all rows, dense causal", ms, everything)
    for ratio in bench.ratios:
        chosen = torch.randperm(num_tokens)[: max(1, round(ratio * num_tokens))].sort().values
        own, plan = queries[chosen.to(bench.device)], _plan(bench, shape, chosen, num_tokens)
        ms = bench.ms(partial(rows_attention, own, keys, values, plan, shape.head_dim**-0.5))
        more: dict[str, Any] = {"rows": len(chosen), "speedup_vs_best_dense": best_ms / ms}
        if bench.device.type == "cuda":
            more["flex_attention_ms"] = _flex_ms(bench, own, keys, values, chosen)
            more["reference_ms"] = _reference_ms(
                bench, partial(rows_attention_reference, own, keys, values, plan, shape.head_dim**-0.5)
            )
        yield bench.row("rows attention", f"{ratio:.0%} of {num_tokens}", ms, _flops(shape, chosen), **more)


def decode_cases(bench: Bench, shape: Shape, num_tokens: int) -> Rows:
    """One row over everything: bound by reading its keys and values."""
    for num_requests in (1, 8):
        works = []
        for _ in range(COPIES):
            queries, keys, values = _attention_inputs(bench, shape, num_requests, num_requests * num_tokens)
            positions = torch.full((num_requests,), num_tokens - 1, device=bench.device)
            requests = [RequestRows(i, 1, i * num_tokens, num_tokens) for i in range(num_requests)]
            slots = positions + torch.arange(num_requests, device=bench.device) * num_tokens
            plan = _plan_of(bench, shape, positions, slots, requests)
            works.append(partial(rows_attention, queries, keys, values, plan, shape.head_dim**-0.5))
        num_bytes = 2 * num_requests * num_tokens * shape.num_kv_heads * shape.head_dim * bench.dtype.itemsize
        case = f"{num_requests} requests, 1 row × {num_tokens} keys"
        yield bench.row("rows attention, decode", case, bench.replay_ms(*works), num_bytes=num_bytes)


def probe_cases(bench: Bench, shape: Shape, num_tokens: int) -> Rows:
    """The question's rows over everything, and the attention that each key receives."""
    num_rows = min(QUESTION_ROWS, num_tokens)
    positions = torch.arange(num_tokens - num_rows, num_tokens)
    plan, works, masses = _plan(bench, shape, positions, num_tokens), [], []
    rows, scaling = (0, num_rows), shape.head_dim**-0.5
    lse = torch.empty(num_rows, shape.num_heads, device=bench.device)
    for _ in range(COPIES):
        queries, keys, values = _attention_inputs(bench, shape, num_rows, num_tokens)
        works.append(partial(rows_attention, queries, keys, values, plan, scaling, lse=lse))
        masses.append(partial(attention_mass, queries, keys, plan, rows, num_tokens, scaling, lse))
    case, flops = f"{num_rows} rows × {num_tokens} keys", _flops(shape, positions)
    yield bench.row("rows attention, probe", case, bench.replay_ms(*works), flops)
    reference = partial(attention_mass_reference, queries, keys, plan, rows, num_tokens, scaling, lse)
    num_bytes = keys.nbytes + 4 * num_tokens
    ms = bench.replay_ms(*masses)
    yield bench.row("attention mass", case, ms, flops / 2, num_bytes, reference_ms=_reference_ms(bench, reference))


def load_cases(bench: Bench, shape: Shape, num_tokens: int) -> Rows:
    """Stored chunks into the arena, all layers."""
    num_chunks = max(1, num_tokens // CHUNK_TOKENS)
    arena_shape = shape.num_layers, shape.num_kv_heads, num_chunks * CHUNK_TOKENS, shape.head_dim
    arena = [torch.zeros(arena_shape, dtype=bench.dtype, device=bench.device) for _ in range(2)]
    inv_freq = torch.rand(shape.head_dim // 2, device=bench.device)
    for codec in CODECS:
        table, num_bytes = _stored(bench, shape, num_chunks, codec)
        halves = torch.randn(num_bytes // 2 + 8, device=bench.device, dtype=torch.float16)  # finite in every codec
        source = halves.view(torch.uint8)
        arguments: tuple[Any, ...] = source, table, CHUNK_TOKENS, codec, bench.dtype, inv_freq, 1.0, *arena
        moved = num_bytes + sum(x.nbytes for x in arena)
        reference_ms = _reference_ms(bench, partial(load_reference_, *arguments))
        ms = bench.replay_ms(partial(load_, *arguments))
        yield bench.row("load", f"{codec}, {num_chunks} chunks", ms, num_bytes=moved, reference_ms=reference_ms)


def prepare_cases(bench: Bench, shape: Shape, num_tokens: int) -> Rows:
    """Rotation and the write to the arena, one layer."""
    for num_rows in (1, max(1, round(0.15 * num_tokens))):
        queries, keys, values = (
            bench.random(num_rows, heads, shape.head_dim)
            for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )
        cos, sin = (bench.random(num_rows, shape.head_dim // 2, dtype=torch.float32) for _ in range(2))
        arena = [bench.random(shape.num_kv_heads, num_tokens, shape.head_dim) for _ in range(2)]
        slots = torch.randperm(num_tokens, device=bench.device)[:num_rows]
        arguments: tuple[Any, ...] = queries, keys, values, cos, sin, slots, *arena
        moved = 2 * (queries.nbytes + keys.nbytes + values.nbytes) + cos.nbytes + sin.nbytes
        reference_ms = _reference_ms(bench, partial(prepare_rows_reference_, *arguments))
        ms = bench.replay_ms(partial(prepare_rows_, *arguments))
        yield bench.row("row preparation", f"{num_rows} rows", ms, num_bytes=moved, reference_ms=reference_ms)


def mlp_cases(bench: Bench, shape: Shape, num_tokens: int) -> Rows:
    """The elementwise part of the MLP, and the norm in front of it, one layer."""
    num_rows, hidden = max(1, round(0.15 * num_tokens)), shape.num_heads * shape.head_dim
    gate, up = bench.random(num_rows, shape.mlp_width), bench.random(num_rows, shape.mlp_width)
    reference_ms = _reference_ms(bench, partial(silu_mul_reference, gate, up))
    ms = bench.ms(partial(silu_mul, gate, up))
    yield bench.row("silu_mul", f"{num_rows} rows", ms, num_bytes=3 * gate.nbytes, reference_ms=reference_ms)
    x, weight = bench.random(num_rows, hidden), bench.random(hidden)
    ms = bench.replay_ms(partial(rms_norm, x, (hidden,), weight, 1e-6))
    spelled_out_ms = bench.ms(partial(_rms_norm_spelled_out, x, weight))
    yield bench.row("torch rms_norm", f"{num_rows} rows", ms, num_bytes=2 * x.nbytes, reference_ms=spelled_out_ms)


def row_cases(bench: Bench, shape: Shape, _num_tokens: int) -> Rows:
    """The linear layers of one decoded row with what stands around them: bound by reading their weights."""
    hidden, width = shape.num_heads * shape.head_dim, shape.mlp_width
    num_out = hidden + 2 * shape.num_kv_heads * shape.head_dim
    x, inner, norm, bias = bench.random(1, hidden), bench.random(1, width), bench.random(hidden), bench.random(num_out)
    copies = range(COPIES if bench.device.type == "cuda" else 1)
    joined = [(x, bench.random(num_out, hidden), bias, norm, 1e-6) for _ in copies]
    gated = [(x, bench.random(width, hidden), bench.random(width, hidden), norm, 1e-6) for _ in copies]
    down = [(inner, bench.random(hidden, width), None, None, 0.0, x) for _ in copies]
    for case, function, reference, arguments in (
        ("norm, queries keys values", linear_of_row, linear_of_row_reference, joined),
        ("norm, silu(gate) · up", swiglu_of_row, swiglu_of_row_reference, gated),
        ("down, residual", linear_of_row, linear_of_row_reference, down),
    ):
        own: Any = function
        plain: Any = reference
        num_bytes = sum(a.nbytes for a in arguments[0] if a is not None and not isinstance(a, float))
        reference_ms = (
            bench.replay_ms(*(partial(plain, *a) for a in arguments)) if bench.device.type == "cuda" else None
        )
        ms = bench.replay_ms(*(partial(own, *a) for a in arguments))
        yield bench.row("row products", case, ms, num_bytes=num_bytes, reference_ms=reference_ms)


CASES: dict[str, Callable[[Bench, Shape, int], Rows]] = {
    "rows": rows_cases,
    "decode": decode_cases,
    "probe": probe_cases,
    "load": load_cases,
    "prepare": prepare_cases,
    "mlp": mlp_cases,
    "row": row_cases,
}


def _attention_inputs(bench: Bench, shape: Shape, num_rows: int, num_keys: int) -> tuple[torch.Tensor, ...]:
    queries = bench.random(num_rows, shape.num_heads, shape.head_dim)
    return queries, *(bench.random(shape.num_kv_heads, num_keys, shape.head_dim) for _ in range(2))


def _plan(bench: Bench, shape: Shape, positions: torch.Tensor, num_tokens: int) -> RowPlan:
    positions = positions.to(bench.device)
    return _plan_of(bench, shape, positions, positions, [RequestRows(0, len(positions), 0, num_tokens)])


def _plan_of(
    bench: Bench, shape: Shape, positions: torch.Tensor, slots: torch.Tensor, requests: list[RequestRows]
) -> RowPlan:
    return plan_rows(positions, slots, requests, shape.num_heads, shape.num_kv_heads, shape.head_dim, bench.dtype)


def _flops(shape: Shape, positions: torch.Tensor) -> float:
    return 4 * shape.num_heads * shape.head_dim * float((positions.double() + 1).sum())


def _reference_ms(bench: Bench, work: Callable[[], object]) -> float | None:
    """None where the reference is what runs anyway."""
    return bench.ms(work) if bench.device.type == "cuda" else None


def _dense(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every dense causal attention there is for these inputs."""
    q, k, v = queries.transpose(0, 1)[None].contiguous(), keys[None], values[None]
    dense = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
    if queries.device.type != "cuda":
        yield "SDPA", dense
        return
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        yield f"SDPA {backend.name.lower()}", partial(_with_backend, backend, dense)
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return
    rows_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    yield "flash-attn", partial(flash_attn_func, *rows_first, causal=True)


def _with_backend(backend: SDPBackend, work: Callable[[], object]) -> object:
    with sdpa_kernel(backend):
        return work()


def _flex_ms(
    bench: Bench, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
) -> float | str:
    """FlexAttention with a block mask of the positions; what went wrong where it does not work."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    at = positions.to(bench.device)
    try:
        compiled = torch.compile(flex_attention, dynamic=False)
        mask = create_block_mask(
            lambda _b, _h, row, key: key <= at[row], None, None, len(at), keys.shape[1], device=str(bench.device)
        )
        q = queries.transpose(0, 1)[None].contiguous()
        return bench.ms(partial(compiled, q, keys[None], values[None], block_mask=mask, enable_gqa=True))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def _stored(bench: Bench, shape: Shape, num_chunks: int, codec: str) -> tuple[torch.Tensor, int]:
    """The table of `num_chunks` encoded chunks behind each other, and how many bytes they take."""
    sizes = KVShape(shape.num_layers, shape.num_kv_heads, CHUNK_TOKENS, shape.head_dim)
    tensors = layout(codec, bench.dtype, sizes)
    chunks, at = [], 0
    for i in range(num_chunks):
        offsets = {"key_scales": 0, "value_scales": 0}
        for t in tensors:
            offsets[t.name] = at
            at += -(-torch.Size(t.shape).numel() * t.dtype.itemsize // 16) * 16
        first = i * CHUNK_TOKENS
        chunks.append(
            ChunkBytes(offsets["kv"], offsets["key_scales"], offsets["value_scales"], CHUNK_TOKENS, first, first)
        )
    return load_table(chunks, bench.device), at


def _rms_norm_spelled_out(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As transformers has it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
