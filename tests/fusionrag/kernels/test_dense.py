"""Dense runs of rows: what serves them gives what plain torch gives, and what cannot is not chosen."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch

from fusionrag.attention import ForwardStep
from fusionrag.errors import ConfigError
from fusionrag.kernels import dense
from fusionrag.kernels.dense import (
    FLASH_MODULES,
    MIN_ROWS,
    DenseAttention,
    Unavailable,
    choose_dense,
    dense_reference,
    flash_attention,
    sdpa,
    try_out,
)
from fusionrag.types import RowGroup, Span

CPU = torch.device("cpu")
SIZES = [(1, 0), (7, 0), (64, 0), (33, 20), (64, 64), (1, 9), (130, 1)]  # rows, positions in front of them


def draw(num_rows, num_before, num_heads=6, num_kv_heads=2, head_dim=16, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_rows + num_before)
    arena = torch.randn(2, num_kv_heads, num_before + num_rows + 11, head_dim, generator=generator).to(device, dtype)
    seen = slice(5, 5 + num_before + num_rows)  # a view of a span, as the arena gives it
    queries = torch.randn(num_rows, num_heads, head_dim, generator=generator).to(device, dtype)
    return queries, arena[0, :, seen], arena[1, :, seen]


def by_definition(queries, keys, values, scaling):
    group, before = queries.shape[1] // keys.shape[0], keys.shape[1] - len(queries)
    rows = []
    for i, row in enumerate(queries):
        own_keys = keys[:, : before + i + 1].repeat_interleave(group, 0)
        own_values = values[:, : before + i + 1].repeat_interleave(group, 0)
        weights = (torch.einsum("hd,hnd->hn", row, own_keys) * scaling).softmax(-1)
        rows.append(torch.einsum("hn,hnd->hd", weights, own_values))
    return torch.stack(rows)


def lower_right(q, k, v, softmax_scale=None, causal=False):
    """As flash-attn documents its function: (batch, rows, heads, D), the mask from the lower right."""
    assert causal
    found = dense_reference(q[0], k[0].transpose(0, 1), v[0].transpose(0, 1), softmax_scale)
    return found[None]


@pytest.mark.parametrize(("num_rows", "num_before"), SIZES)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_the_reference_is_the_definition(num_rows, num_before, num_kv_heads):
    inputs = draw(num_rows, num_before, num_kv_heads=num_kv_heads)
    torch.testing.assert_close(dense_reference(*inputs, 0.3), by_definition(*inputs, 0.3))


@pytest.mark.parametrize(("num_rows", "num_before"), SIZES)
def test_flash_attn_is_called_in_the_layout_that_it_documents(num_rows, num_before):
    inputs = draw(num_rows, num_before)
    expected = by_definition(*inputs, 0.3)
    torch.testing.assert_close(flash_attention(lower_right, *inputs, 0.3), expected)
    with_lse = lambda *a, **k: (lower_right(*a, **k), torch.zeros(1))  # noqa: E731 as some versions return it
    torch.testing.assert_close(flash_attention(with_lse, *inputs, 0.3), expected)


@pytest.mark.parametrize("num_rows", [1, 7, 64, 130])
def test_torchs_flash_kernel_gives_the_definition(num_rows):
    """On the CPU for whole prompts; pieces behind something are tried on a GPU, whose kernel knows that mask."""
    inputs = draw(num_rows, 0)
    torch.testing.assert_close(sdpa(*inputs, 0.3), by_definition(*inputs, 0.3), rtol=0, atol=1e-5)


def test_a_function_with_another_mask_is_found_out():
    def upper_left(queries, keys, values, scaling):
        num_rows = len(queries)
        return dense_reference(queries, keys[:, :num_rows], values[:, :num_rows], scaling)

    try_out(dense_reference, CPU, torch.bfloat16, 6, 2, 16)
    with pytest.raises(Unavailable, match="differs from plain torch by"):
        try_out(upper_left, CPU, torch.bfloat16, 6, 2, 16)


def test_a_function_that_gives_nothing_finite_or_raises_is_found_out():
    with pytest.raises(Unavailable, match="differs from plain torch by nan"):
        try_out(lambda q, *_: q * float("nan"), CPU, torch.bfloat16, 6, 2, 16)

    def refuses(*_):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")

    with pytest.raises(Unavailable, match=r"does not run here \(RuntimeError: FlashAttention only supports Ampere"):
        try_out(refuses, CPU, torch.bfloat16, 6, 2, 16)


def test_on_a_cpu_rows_attention_serves_dense_runs_too():
    chosen = choose_dense("auto", CPU, torch.float32, 6, 2, 16)
    assert chosen.name == "rows" and not chosen.takes(10_000, 10_000, None)
    for wanted in ("flash-attn", "sdpa"):
        with pytest.raises(ConfigError, match=f"^dense_attention: {wanted} serves GPUs only"):
            choose_dense(wanted, CPU, torch.float32, 6, 2, 16)


def test_few_rows_and_windows_are_left_to_rows_attention():
    chosen = DenseAttention("any", "", dense_reference)
    assert chosen.takes(MIN_ROWS, 9000, None) and not chosen.takes(MIN_ROWS - 1, 9000, None)
    assert chosen.takes(MIN_ROWS, 300, 300) and not chosen.takes(MIN_ROWS, 301, 300)


@pytest.fixture
def installed(monkeypatch):
    """Makes flash-attn modules importable: name → its `flash_attn_func`, or the error that importing it raises."""
    for name, _ in FLASH_MODULES:
        monkeypatch.setitem(sys.modules, name, None)  # not installed, wherever this runs

    def install(**functions):
        for name, function in functions.items():
            module = ModuleType(name)
            module.flash_attn_func = function
            monkeypatch.setitem(sys.modules, name, module)

    return install


def test_the_first_flash_attn_that_can_be_imported_is_taken(installed):
    with pytest.raises(Unavailable, match="not installed"):
        dense._flash_attention()
    installed(flash_attn=lower_right)
    name, function = dense._flash_attention()
    assert name == "flash-attn 2"
    inputs = draw(33, 20)
    torch.testing.assert_close(function(*inputs, 0.3), by_definition(*inputs, 0.3))
    installed(flash_attn_interface=lower_right)
    assert dense._flash_attention()[0] == FLASH_MODULES[0][1]


# --- in a forward pass --------------------------------------------------------------------------------------------


class Counting:
    def __init__(self):
        self.calls = []

    def __call__(self, queries, keys, values, scaling):
        self.calls.append((len(queries), keys.shape[1]))
        return dense_reference(queries, keys, values, scaling)


@pytest.fixture
def runs(make_model, monkeypatch):
    """A model whose dense runs are counted, and one that has none."""
    counting, plain = Counting(), make_model("llama", seed=3)
    counted = make_model("llama", seed=3, bos_token_id=255)  # the same weights
    monkeypatch.setattr(counted, "dense", DenseAttention("counting", "", counting))
    return counted, plain, counting


def rows(model, first, num_rows, span, num_logits=1, is_known=True):
    ids, positions = model.rows([(7 * i) % 250 for i in range(num_rows)], first)
    return RowGroup(span, ids, positions, num_logits, first_position=first if is_known else None)


def forward(model, passes):
    arena = model.new_arena(1000)
    return torch.cat([model.forward(groups, arena) for groups in passes])


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([(0, 600)], [(600, 600)] * 2),
        ([(0, 300), (300, 300)], [(300, 300)] * 2 + [(300, 600)] * 2),
        ([(0, 300), (300, 40), (340, 260)], [(300, 300)] * 2 + [(260, 600)] * 2),  # the short piece is none of theirs
    ],
)
def test_a_prompt_and_pieces_of_one_run_dense_and_give_the_same(pieces, expected, runs):
    counted, plain, counting = runs
    passes = [[(first, num_rows)] for first, num_rows in pieces]
    found = [
        forward(model, [[rows(model, *p, Span(13, 700)) for p in groups] for groups in passes])
        for model in (counted, plain)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    assert counting.calls == expected, "once a layer, but for the last, where one row is wanted"


def test_several_dense_groups_of_one_pass_each_see_their_own_span(runs):
    counted, plain, counting = runs
    found = [
        forward(model, [[rows(model, 0, 300, Span(13, 310)), rows(model, 0, 260, Span(400, 300))]])
        for model in (counted, plain)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    assert counting.calls == [(300, 300), (260, 260)] * 2


def test_a_pass_with_scattered_rows_or_unknown_positions_is_rows_attentions(runs):
    counted, _, counting = runs
    forward(counted, [[rows(counted, 0, 300, Span(13, 310), is_known=False)]])
    forward(counted, [[rows(counted, 0, 300, Span(13, 310)), rows(counted, 0, 1, Span(400, 10), is_known=False)]])
    assert counting.calls == []


def test_all_wanted_rows_of_a_dense_run_stay_one_at_the_last_layer(runs):
    counted, plain, counting = runs
    found = [forward(m, [[rows(m, 0, 600, Span(0, 700), num_logits=300)]]) for m in (counted, plain)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    assert counting.calls == [(600, 600), (600, 600), (300, 600)]


def test_the_engine_knows_which_of_its_passes_are_dense(make_bench, monkeypatch):
    bench = make_bench(seed=5)
    counting = Counting()
    monkeypatch.setattr(bench.model, "dense", DenseAttention("counting", "", counting))
    chunks = bench.chunks(300, 280)
    bench.preprocess(chunks)
    layers, start = bench.model.shape.num_layers, len(bench.prompts.prefix_ids)
    assert {(r, k) for r, k in counting.calls} == {(300, start + 300), (280, start + 280)}, "raw passes"
    counting.calls.clear()
    plan = bench.plan(chunks)
    full = bench.prefill(plan, method="full").logits
    assert counting.calls == [(plan.num_tokens, plan.num_tokens)] * (layers - 1)
    counting.calls.clear()
    bench.prefill(plan, recompute_ratio=0.9)
    assert counting.calls == [], "selected rows have gaps"
    bench.store.delete(bench.spec(chunks[1]).digest)
    found = bench.prefill(plan, recompute_ratio=0.0)
    assert counting.calls == [(280, start + 580)] * (layers - 1), "a missing chunk, of which no row is wanted"
    torch.testing.assert_close(found.logits, full, rtol=0, atol=1e-4)


def test_a_step_without_a_choice_is_rows_attentions():
    assert ForwardStep.__dataclass_fields__["dense"].default is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_torchs_fused_kernels_give_the_definition(self, dtype, head_dim):
        chosen = choose_dense("sdpa", torch.device("cuda"), dtype, 28, 4, head_dim)
        assert chosen.function is not None, chosen.why
        for num_rows, num_before in [*SIZES[3:], (1000, 0), (777, 1234)]:
            inputs = draw(num_rows, num_before, 28, 4, head_dim, "cuda", dtype)
            exact = by_definition(*(x.double() for x in inputs), head_dim**-0.5)
            error = (chosen(*inputs, head_dim**-0.5) - exact).abs().max()
            own = (dense_reference(*inputs, head_dim**-0.5) - exact).abs().max()  # rounded once, at the end
            assert error <= 4 * own + 1e-3

    def test_a_choice_is_made_without_a_warning(self, caplog):
        caplog.set_level(logging.WARNING)
        assert choose_dense("auto", torch.device("cuda"), torch.bfloat16, 28, 4, 128).why
        assert caplog.records == []

    def test_every_library_that_is_here_is_tried(self):
        for wanted in ("sdpa", "rows", "flash-attn"):
            try:
                chosen = choose_dense(wanted, torch.device("cuda"), torch.bfloat16, 28, 4, 128)
            except ConfigError as error:
                assert "not installed" in str(error) or "does not run here" in str(error)
            else:
                assert chosen.name
