"""Loading a decoder and running rows through it.

Knows nothing of chunks, stores or requests. What it guarantees: a model that is loaded is one whose keys can be stored
before rotation and moved (I3); everything else is refused at load with a message that says which and why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fusionrag import default_model
from fusionrag.arena import KVArena
from fusionrag.attention import ForwardStep
from fusionrag.config import ModelConfig
from fusionrag.decoder import Decoder, Stream
from fusionrag.errors import ConfigError, ModelNotFound, UnsupportedModel
from fusionrag.kernels.backend import to_device
from fusionrag.kernels.dense import choose_dense
from fusionrag.rope import Rope, extract_rope
from fusionrag.types import RowGroup

# Families whose attention was checked: plain causal softmax attention, RoPE by halves, keys rotated last.
SUPPORTED = ("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
FINGERPRINT_SAMPLES = 4096  # elements read per tensor: a fine-tune changes nearly all, so a sample tells models apart


@dataclass(frozen=True)
class ModelShape:
    """The dimensions that the arena and the store need; see the legend in `fusionrag.types`."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


def shape_of(config: Any) -> ModelShape:
    """config: a supported decoder's."""
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
    )


class LanguageModel:
    """A transformers decoder, run by rows. Not thread-safe: one thread runs `forward`."""

    def __init__(
        self, hf: Any, tokenizer: Any, name: str, max_model_len: int = 0, dense_attention: str = "auto"
    ) -> None:
        """hf: a `…ForCausalLM` of a supported family; its weights are used, its own forward is not."""
        config = hf.config
        check_supported(config)
        limit = int(config.max_position_embeddings)
        decoder = hf.get_decoder()
        self.name = name
        self.tokenizer = tokenizer
        self.rope: Rope = extract_rope(decoder.rotary_emb, limit)
        self.max_model_len = min(max_model_len or limit, limit)
        self.shape = shape_of(config)
        self._hf, self._decoder, self._head = hf.eval(), Decoder(decoder, config), hf.get_output_embeddings()
        torch.cuda.empty_cache()  # what joined weights have left behind, gigabytes that others than torch cannot use
        self.dtype: torch.dtype = self._head.weight.dtype
        self.device: torch.device = self._head.weight.device
        s = self.shape
        self.dense = choose_dense(dense_attention, self.device, self.dtype, s.num_heads, s.num_kv_heads, s.head_dim)

    def new_arena(self, num_slots: int) -> KVArena:
        s = self.shape
        return KVArena(s.num_layers, s.num_kv_heads, s.head_dim, num_slots, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, groups: Sequence[RowGroup], arena: KVArena) -> torch.Tensor:
        """Runs all rows of all groups in one pass and writes their K/V at their slots.

        Returns fp32 logits (Σ num_logits, V): for each group in order, of its last `num_logits` rows.
        """
        positions = torch.cat([g.positions for g in groups])
        slots = torch.cat([g.positions + g.span.start for g in groups])
        step = ForwardStep(tuple(groups), arena, positions, slots, *self.rope.tables(positions), dense=self.dense)
        hidden = self._decoder.embed(torch.cat([g.token_ids for g in groups]))
        return self.logits(self.run_layers(hidden, step, range(self.shape.num_layers)))

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: (R,) → (R, hidden size). This and the next two are `forward` in pieces."""
        return self._decoder.embed(token_ids)

    def run_layers(self, hidden: torch.Tensor, step: ForwardStep, layers: range) -> torch.Tensor:
        """As `Decoder.run`."""
        return self._decoder.run(hidden, step, layers)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: (W, hidden size), out of the last layer → (W, V) fp32."""
        logits: torch.Tensor = self._head(self._decoder.finish(hidden)).float()
        return logits

    def layer_on_noise(self, num_rows: int) -> Callable[[], None]:
        """Runs all of one layer but its attention on made-up rows: for timing."""
        layer, shape = self._decoder.layers[-1], self.shape
        hidden = torch.randn(num_rows, self.hidden_size, dtype=self.dtype, device=self.device)
        attended = torch.randn(num_rows, shape.num_heads, shape.head_dim, dtype=self.dtype, device=self.device)

        def run() -> None:
            layer.project(Stream(hidden))
            layer.finish(hidden, attended)

        return run

    def rows(self, token_ids: Sequence[int], first_position: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """token_ids and positions of a contiguous run, as tensors on the model's device."""
        ids = to_device(torch.tensor(token_ids, dtype=torch.int64), self.device)
        return ids, torch.arange(first_position, first_position + len(ids), device=self.device)

    def synchronize(self) -> None:
        """Waits until queued device work is done, so that a phase's time is its own."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def hidden_size(self) -> int:
        return int(self._hf.config.hidden_size)

    @property
    def is_mixture(self) -> bool:
        """Whether rows meet only some of the weights (mixture of experts)."""
        config = self._hf.config
        return bool(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None))

    @cached_property
    def num_active_parameters(self) -> int:
        return active_parameters(self._hf)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends an answer: the tokenizer's and the generation config's."""
        ids = [self.tokenizer.eos_token_id]
        configured = getattr(self._hf.generation_config, "eos_token_id", None)
        ids += configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the configuration, the tokenizer and a sample of every weight.

        Two models with the same fingerprint give the same K/V for the same token ids.
        """
        config = {k: v for k, v in self._hf.config.to_dict().items() if k not in _NOT_IN_FINGERPRINT}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(tokenizer_fingerprint(self.tokenizer).encode())
        for name, weight in self._hf.state_dict().items():
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].float().cpu()
            digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()


def active_parameters(hf: Any) -> int:
    """Parameters that every row meets: no embeddings and no head; of experts, those that are chosen."""
    config = hf.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    share = getattr(config, "num_experts_per_tok", experts) / experts
    embedding = hf.get_input_embeddings().weight
    weights = {n: w for n, w in hf.get_decoder().named_parameters() if w.ndim > 1 and w is not embedding}
    return int(sum(w.numel() * (share if ".experts." in n else 1) for n, w in weights.items()))


_NOT_IN_FINGERPRINT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Changes whenever the tokenizer could return other ids for some text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spelled = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(spelled.encode()).hexdigest()


def check_supported(config: Any) -> None:
    """Raises UnsupportedModel naming what cannot be handled and why."""
    kind = config.model_type
    if kind not in SUPPORTED:
        raise UnsupportedModel(f"architecture {kind!r} is not supported; supported are {', '.join(SUPPORTED)}")
    layer_types = getattr(config, "layer_types", None) or []
    if kind == "qwen2_moe" and "sliding_attention" in layer_types:
        raise UnsupportedModel("qwen2_moe with sliding-window layers: the window does not reach the attention function")
    strange = set(layer_types) - {"full_attention", "sliding_attention"}
    if strange:
        raise UnsupportedModel(f"{kind!r} has layers of kind {', '.join(sorted(strange))}; only attention is supported")


def model_path(config: ModelConfig) -> str:
    """Where the configured model's files are; the packaged one is converted on first use."""
    return str(default_model.default_model_dir()) if config.model == default_model.ALIAS else config.model


def load_tokenizer(config: ModelConfig) -> Any:
    """The configured model's tokenizer alone. Raises ModelNotFound."""
    try:
        return AutoTokenizer.from_pretrained(model_path(config))
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"model {config.model!r}: {error}") from error


def load_model(config: ModelConfig) -> LanguageModel:
    """Loads the configured model. Raises ModelNotFound, UnsupportedModel or ConfigError."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    path = model_path(config)
    try:
        hf_config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelNotFound(f"model {config.model!r}: {error}") from error
    check_supported(hf_config)
    if config.max_model_len > hf_config.max_position_embeddings:
        raise ConfigError("max_model_len", f"{config.model!r} ends at {hf_config.max_position_embeddings} tokens")
    tokenizer = load_tokenizer(config)
    if len(tokenizer) > hf_config.vocab_size:  # on a GPU, an id without an embedding would end the whole process
        raise UnsupportedModel(
            f"model {config.model!r}: its tokenizer has {len(tokenizer)} tokens, its embedding {hf_config.vocab_size}; "
            "the two do not belong together"
        )
    try:
        with _no_progress_bar():
            hf = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"model {config.model!r}: {error}") from error
    name = config.model if config.model == default_model.ALIAS else Path(path).name
    hf = hf.to(device)  # type: ignore[arg-type]
    return LanguageModel(hf, tokenizer, name, config.max_model_len, config.dense_attention)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading is quick; a bar of the library's on standard error would stand between the lines of ours."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError("device", f"unknown device {device!r}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", f"{device!r} asked for, but torch sees no CUDA device")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved
