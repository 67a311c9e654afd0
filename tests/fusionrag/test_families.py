"""Every supported family: our hook gives what stock transformers gives; what cannot be reused is refused by name."""

from __future__ import annotations

import pytest
import torch

from fusionrag.config import ModelConfig
from fusionrag.errors import ConfigError, ModelError, ModelNotFound, UnsupportedModel
from fusionrag.model import SUPPORTED, LanguageModel, check_supported, load_model
from fusionrag.rope import extract_rope
from fusionrag.types import RowGroup, Span

NUM_TOKENS = 90  # more than four sliding windows, and more than the unscaled length of the scaled RoPE kinds


@pytest.fixture(scope="session")
def token_ids():
    return torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stock_logits(make_hf, make_config, token_ids):
    def logits(family):
        with torch.no_grad():
            return make_hf(make_config(family), "eager")(token_ids[None]).logits[0]

    return logits


def run_rows(model, token_ids, cuts):
    """Logits of all tokens, run in pieces [0, cuts[0]), [cuts[0], cuts[1]), …"""
    span, arena, logits, begin = Span(13, 150), model.new_arena(200), [], 0
    for end in [*cuts, len(token_ids)]:
        positions = torch.arange(begin, end)
        logits.append(model.forward([RowGroup(span, token_ids[begin:end], positions, end - begin)], arena))
        begin = end
    return torch.cat(logits)


def test_the_families_tested_are_the_families_supported(families):
    assert {family.partition("-")[0] for family in families} == set(SUPPORTED)


def test_full_prefill_equals_stock_transformers(family, make_model, stock_logits, token_ids):
    expected = stock_logits(family)
    assert expected.std() > 0.5  # logits that differ: the comparison below can fail
    torch.testing.assert_close(run_rows(make_model(family), token_ids, []), expected, rtol=0, atol=1e-4)


def test_prefill_in_pieces_equals_stock_transformers(family, make_model, stock_logits, token_ids):
    logits = run_rows(make_model(family), token_ids, [1, 2, 37, 38, 61])
    torch.testing.assert_close(logits, stock_logits(family), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_changes_the_logits(family, make_model, make_hf, make_config, token_ids):
    """Else the tests above would say nothing about windows."""
    sliding = run_rows(make_model(f"{family}-sliding"), token_ids, [])
    config = make_config(f"{family}-sliding", sliding_window=1000)
    with torch.no_grad():
        wide = make_hf(config, "eager")(token_ids[None]).logits[0]
    assert (sliding - wide)[:20].abs().max() < 1e-4
    assert (sliding - wide)[30:].abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama-linear", "llama-llama3", "llama-yarn", "phi3-partial"])
def test_a_scaled_or_partial_rope_changes_the_logits(family, make_model, token_ids):
    scaled, plain = (run_rows(make_model(f), token_ids, []) for f in (family, family.partition("-")[0]))
    assert (scaled - plain).abs().max() > 0.1


def test_requests_in_one_pass_do_not_see_each_other(model, token_ids):
    arena = model.new_arena(200)
    first, second = token_ids[:40], token_ids[40:]
    groups = [RowGroup(Span(begin, 60), ids, torch.arange(len(ids)), 1) for begin, ids in ((100, first), (7, second))]
    together = model.forward(groups, arena)
    alone = torch.cat([run_rows(model, ids, [])[-1:] for ids in (first, second)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------------

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "dynamic"), ("llama", "longrope"), ("qwen2", "dynamic"), ("qwen2", "longrope"), ("phi3", "longrope")],
)
def test_a_rope_that_depends_on_the_length_is_refused_by_name(family, kind, make_model):
    rope_parameters = {"dynamic": DYNAMIC, "longrope": LONGROPE}[kind]
    with pytest.raises(UnsupportedModel, match=f"RoPE kind '{kind}'"):
        make_model(family, rope_parameters=rope_parameters)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen3_5_text", "olmo2"])
def test_an_unknown_architecture_is_refused_by_name(kind, make_config):
    with pytest.raises(UnsupportedModel, match=f"architecture '{kind}'.*supported are llama"):
        check_supported(make_config(kind))


def test_an_unknown_architecture_is_refused_before_its_weights_are_read(make_config, tmp_path):
    make_config("gpt2").save_pretrained(tmp_path)  # no weights there at all
    with pytest.raises(UnsupportedModel, match="'gpt2'"):
        load_model(ModelConfig(model=str(tmp_path)))


def test_qwen2_moe_with_sliding_layers_is_refused(make_model):
    with pytest.raises(UnsupportedModel, match="qwen2_moe with sliding-window layers"):
        make_model("qwen2_moe", use_sliding_window=True, sliding_window=20, max_window_layers=1)


def test_layers_without_softmax_attention_are_refused(make_config):
    config = make_config("qwen3")
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(UnsupportedModel, match="linear_attention"):
        check_supported(config)


class StretchingRotary(torch.nn.Module):
    """Says 'default', but its table depends on the length of the sequence."""

    def __init__(self, unlike):
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(4) / 4))
        self.rope_type, self.unlike = "default", unlike

    def forward(self, x, position_ids):
        angles = position_ids[0].float()[:, None] * self.inv_freq
        if self.unlike == "length":
            angles = angles / max(1.0, float(position_ids.max()) / 100)
        if self.unlike == "interleaved":
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat([angles, angles], dim=-1)
        return angles.cos()[None].to(x.dtype), angles.sin()[None].to(x.dtype)


@pytest.mark.parametrize("unlike", ["length", "interleaved"])
def test_a_rotary_module_unlike_its_table_is_refused_whatever_it_calls_itself(unlike):
    assert extract_rope(StretchingRotary(unlike=None), 1000).rotary_dim == 8
    with pytest.raises(UnsupportedModel, match=r"StretchingRotary.*'default'.*not a static rotation by halves"):
        extract_rope(StretchingRotary(unlike), 1000)


def test_a_rotary_module_without_a_table_is_refused():
    with pytest.raises(UnsupportedModel, match="Identity has no single table of frequencies"):
        extract_rope(torch.nn.Identity(), 1000)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def saved_model(make_hf, make_config, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_hf(make_config("llama"), "eager").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_saved_model_loads_with_the_fingerprint_and_the_logits_of_the_original(saved_model, model, token_ids):
    loaded = load_model(ModelConfig(model=str(saved_model), device="cpu"))
    assert (loaded.name, loaded.dtype, loaded.max_model_len) == ("tiny-llama", torch.float32, 1024)
    assert loaded.fingerprint == model.fingerprint
    assert torch.equal(run_rows(loaded, token_ids, []), run_rows(model, token_ids, []))


def test_a_bfloat16_model_keeps_its_kv_in_bfloat16(saved_model, model, token_ids):
    loaded = load_model(ModelConfig(model=str(saved_model), device="cpu", dtype="bfloat16"))
    assert loaded.new_arena(8).keys.dtype == torch.bfloat16
    assert loaded.fingerprint != model.fingerprint  # other weights, other KV
    difference = run_rows(loaded, token_ids, []) - run_rows(model, token_ids, [])
    assert difference.abs().mean() < 0.1


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelNotFound, match="no-such-model"):
        load_model(ModelConfig(model=str(tmp_path / "no-such-model")))


def test_a_configuration_that_transformers_refuses_is_an_error_of_ours(tmp_path):
    rope = '{"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}'
    (tmp_path / "config.json").write_text(f'{{"model_type": "phi3", "rope_parameters": {rope}}}')
    with pytest.raises(ModelError, match=r"rope_parameters.*dynamic"):
        load_model(ModelConfig(model=str(tmp_path)))


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(
    make_hf, make_config, tokenizer, tmp_path
):
    make_hf(make_config("llama", vocab_size=len(tokenizer) - 1), "eager").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"tokenizer has 261 tokens, its embedding 260"):
        load_model(ModelConfig(model=str(tmp_path), device="cpu"))


def test_max_model_len_beyond_the_models_own_limit_is_refused_by_name(saved_model):
    with pytest.raises(ConfigError, match=r"max_model_len.*1024"):
        load_model(ModelConfig(model=str(saved_model), max_model_len=1025))
    assert load_model(ModelConfig(model=str(saved_model), max_model_len=100)).max_model_len == 100


@pytest.mark.parametrize("device", ["tpu9", "cuda:0" if not torch.cuda.is_available() else "cuda:x"])
def test_a_device_that_is_not_there_is_refused_by_name(device, saved_model):
    with pytest.raises(ConfigError, match=f"device.*{device}"):
        load_model(ModelConfig(model=str(saved_model), device=device))


# --- fingerprint ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_tells_models_apart(make_model, make_hf, make_config, tokenizer, make_tokenizer):
    def built(tokenizer=tokenizer, change=lambda hf: None, **config):
        hf = make_hf(make_config("llama", **config), "eager")
        change(hf)
        return LanguageModel(hf, tokenizer, "x").fingerprint

    def nudge(hf):
        hf.model.layers[1].self_attn.k_proj.weight.data.mul_(1.001)

    same, *others = [
        built(),
        make_model(seed=1).fingerprint,
        built(change=nudge),
        built(rms_norm_eps=1e-5),
        built(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        built(tokenizer=make_tokenizer(merges=[("a", "b")])),
    ]
    assert same == make_model().fingerprint
    assert len({same, *others}) == 6
