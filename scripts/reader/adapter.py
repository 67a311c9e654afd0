"""The adapter: PEFT's LoRA on all seven linear layers and trainable norms, and the file that the server reads.

The file's names are those of `fusionrag.default_model.merge_adapter_`. Invariant: what is saved, merged by the server,
is what was trained, rounded to bf16.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scripts.reader.config import TrainingConfig

LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"n1": "input_layernorm", "n2": "post_attention_layernorm"}


def add_adapter(model: Any, config: TrainingConfig) -> Any:
    """A PEFT model around `model`, equal to it until it is trained; only the adapter and the norms are trainable.

    What is trained is fp32 whatever the model's dtype; inputs are cast by autocast, not by PEFT as well.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=round(config.scale * config.rank),
        target_modules=[name.split(".")[-1] for name in LINEARS.values()],
        modules_to_save=[*NORMS.values(), "norm"],
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # PEFT asks transformers by a name that is going away
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
    return adapted


def parameter_groups(model: Any, config: TrainingConfig) -> list[dict[str, Any]]:
    """Matrices and norms, each with its peak learning rate."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if "lora_" in name], "lr": config.learning_rate},
        {"params": [p for name, p in trained if "lora_" not in name], "lr": config.norm_learning_rate},
    ]


def save_adapter(model: Any, path: Path, scale: float) -> None:
    """Writes the adapter's weights in bf16."""
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in _named_weights(model)}
    tensors["scale"] = torch.tensor(scale)
    save_file(tensors, path)


@torch.no_grad()
def load_adapter_(model: Any, path: Path, scale: float) -> None:
    """Starts from a saved adapter. Raises ValueError if its rank or scale is another."""
    tensors = load_file(path)
    if float(tensors["scale"]) != scale:
        raise ValueError(f"{path}: scale is {float(tensors['scale'])}, not {scale}")
    for name, parameter in _named_weights(model):
        if tensors[name].shape != parameter.shape:
            raise ValueError(f"{path}: {name} is {list(tensors[name].shape)}, not {list(parameter.shape)}")
        parameter.copy_(tensors[name])


def _named_weights(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The file's names and the PEFT model's trained weights."""
    decoder = model.get_base_model().model
    for i, layer in enumerate(decoder.layers):
        for short, path in LINEARS.items():
            linear = layer.get_submodule(path)
            yield f"{i}.{short}.A", linear.lora_A["default"].weight
            yield f"{i}.{short}.B", linear.lora_B["default"].weight
        for short, path in NORMS.items():
            yield f"{i}.{short}", layer.get_submodule(path).modules_to_save["default"].weight
    yield "nf", decoder.norm.modules_to_save["default"].weight
