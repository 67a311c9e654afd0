"""The file that training writes is what the server merges."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fusionrag.default_model import ADAPTER, merge_adapter_
from scripts.reader.adapter import add_adapter, load_adapter_, save_adapter

IDS = torch.arange(40)[None]


def disturb_(model) -> None:
    """Weights as after training, exact in bf16."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
                parameter.copy_(parameter.bfloat16().float())


def test_a_new_adapter_changes_nothing(make_config, make_hf, small):
    base = make_hf(make_config("llama"), "sdpa")
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        assert torch.equal(add_adapter(base, small)(input_ids=IDS).logits, before)


def test_the_servers_merge_of_the_file_equals_pefts_own(tmp_path, make_peft, make_config, make_hf, small):
    model = make_peft()
    disturb_(model)
    save_adapter(model, tmp_path / "adapter.safetensors", small.scale)
    merged = make_hf(make_config("llama", max_position_embeddings=4096), "sdpa")
    weights = merged.state_dict()
    untouched = {name: weight.clone() for name, weight in weights.items()}
    merge_adapter_(weights, load_file(tmp_path / "adapter.safetensors"))
    expected = model.merge_and_unload().state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)
    changed = [name for name in weights if not torch.equal(weights[name], untouched[name])]
    assert len(changed) == 3 * (7 + 2) + 1  # all linear layers and norms, nothing else


def test_training_can_go_on_from_a_saved_adapter(tmp_path, make_peft, small):
    first, second = make_peft(), make_peft()
    disturb_(first)
    save_adapter(first, tmp_path / "adapter.safetensors", small.scale)
    load_adapter_(second, tmp_path / "adapter.safetensors", small.scale)
    with torch.no_grad():
        assert torch.equal(first(input_ids=IDS).logits, second(input_ids=IDS).logits)


def test_an_adapter_of_another_rank_or_scale_is_refused(tmp_path, make_peft, make_config, make_hf, small):
    from dataclasses import replace

    save_adapter(make_peft(), tmp_path / "adapter.safetensors", small.scale)
    other = add_adapter(make_hf(make_config("llama"), "sdpa"), replace(small, rank=2))
    with pytest.raises(ValueError, match=r"0\.q\.A"):
        load_adapter_(other, tmp_path / "adapter.safetensors", small.scale)
    with pytest.raises(ValueError, match="scale"):
        load_adapter_(other, tmp_path / "adapter.safetensors", 3.0)


def test_the_file_has_the_names_of_the_packaged_adapter(tmp_path, make_peft, small):
    save_adapter(make_peft(num_hidden_layers=30), tmp_path / "adapter.safetensors", small.scale)
    saved, packaged = load_file(tmp_path / "adapter.safetensors"), load_file(ADAPTER)
    assert saved.keys() == packaged.keys()
    assert {t.dtype for t in saved.values()} == {t.dtype for t in packaged.values()}
    assert ADAPTER.stat().st_size <= 16 * 2**20
