"""Decoders of published shapes with random weights: what speed depends on is there, nothing has to be downloaded.

Shapes are those of the models' public configuration files. The tokenizer is one token a byte: prompts are token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fusionrag.config import ModelConfig
from fusionrag.errors import ConfigError
from fusionrag.model import LanguageModel, ModelShape, active_parameters, resolve_device, resolve_dtype, shape_of

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "tiny": {  # to try the benchmark itself out
        "model_type": "qwen2",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16384,
    },
}


@dataclass(frozen=True)
class PublishedShape:
    """A `fusionrag.cost.DecoderSize`: enough to tell what a decoder costs, without weights."""

    shape: ModelShape
    num_active_parameters: int
    dtype: torch.dtype


def published_shape(name: str, dtype: torch.dtype) -> PublishedShape:
    """Raises ConfigError for an unknown shape."""
    hf_config = _config(name)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)  # type: ignore[no-untyped-call]
    return PublishedShape(shape_of(hf_config), active_parameters(hf), dtype)


def random_model(shape: str, config: ModelConfig) -> tuple[LanguageModel, Any]:
    """The model, and the stock transformers decoder whose weights it uses. Raises ConfigError for an unknown shape."""
    hf_config, device = _config(shape), resolve_device(config.device)
    torch.manual_seed(0)
    with device:
        hf = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            hf_config, dtype=resolve_dtype(config.dtype, device), attn_implementation="sdpa"
        )
    name = f"{shape}, random weights"
    return LanguageModel(hf.eval(), _byte_tokenizer(), name, config.max_model_len, config.dense_attention), hf


def _config(shape: str) -> Any:
    if shape not in SHAPES:
        raise ConfigError("shape", f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")
    settings = dict(SHAPES[shape])
    return AutoConfig.for_model(settings.pop("model_type"), **settings, bos_token_id=256, eos_token_id=257)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|begin|>", "<|end|>")])
    ends = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ends)  # type: ignore[no-untyped-call]
