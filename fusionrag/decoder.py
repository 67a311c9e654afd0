"""The decoder's layers as this engine runs them: the weights are a transformers model's, the loop over them is ours.

Why not the library's own forward: rows must be able to stop at a layer, to wait for a layer's stored KV, to leave a
layer half way, and to be captured in a CUDA graph; and a pass of few rows must not spend its time on launches. What
all supported families share – pre-norm, softmax attention with RoPE, a gated MLP or experts – fits one loop; experts
and every other MLP are called as the library wrote them. `tests/fusionrag/test_families.py` holds every family to the
logits of stock transformers.

Knows nothing of chunks, requests or stored KV; what attends to what is the `ForwardStep`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn.functional import linear, rms_norm

from fusionrag.attention import ForwardStep
from fusionrag.kernels.add_norm import add_norm
from fusionrag.kernels.one_row import linear_of_row, swiglu_of_row
from fusionrag.kernels.swiglu import silu_mul

Joined: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias
WINDOW_OF_ALL_LAYERS = ("mistral", "mixtral", "phi3")  # families whose configuration has one window for all layers


@dataclass(frozen=True)
class Stream:
    """Hidden states (R, hidden size) as a sum that is not added up yet: the norm behind it does that on its way."""

    hidden: torch.Tensor
    branch: torch.Tensor | None = None

    def normed(self, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum and its RMS norm."""
        if self.branch is None:
            return self.hidden, norm(self.hidden, module)
        return add_norm(self.hidden, self.branch, module.weight, module.variance_epsilon)

    def total(self) -> torch.Tensor:
        return self.hidden if self.branch is None else self.hidden + self.branch


class DecoderLayer:
    """One layer's modules and the functions of hidden states that they make up."""

    def __init__(self, layer: Any, config: Any) -> None:
        self._attention, self._mlp = layer.self_attn, layer.mlp
        self._input_norm, self._mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._head_dim = self._attention.head_dim
        self._qkv = _joined_qkv(self._attention)
        self._sizes = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        every = config.sliding_window if config.model_type in WINDOW_OF_ALL_LAYERS else None
        self.window: int | None = getattr(self._attention, "sliding_window", every)
        self.scaling: float = self._attention.scaling
        self._is_swiglu = config.hidden_act == "silu" and hasattr(self._mlp, "gate_proj")
        self._is_swiglu_without_bias = self._is_swiglu and self._mlp.gate_proj.bias is None
        self._gate_up = _joined_gate_up(self._mlp) if config.hidden_act == "silu" else None

    def project(self, stream: Stream) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The stream's sum (R, hidden size), queries (R, H, D), keys and values (R, G, D), all before rotation."""
        attention, before = self._attention, self._input_norm
        if len(stream.hidden) == 1:
            hidden = stream.total()
            joined = linear_of_row(hidden, *self._qkv, before.weight, before.variance_epsilon)
        else:
            hidden, normed = stream.normed(before)
            joined = linear(normed, *self._qkv)
        projected = joined.split([n * self._head_dim for n in self._sizes], dim=-1)  # type: ignore[no-untyped-call]
        queries, keys, values = (p.view(-1, n, self._head_dim) for p, n in zip(projected, self._sizes, strict=True))
        if hasattr(attention, "q_norm"):
            queries, keys = norm(queries, attention.q_norm), norm(keys, attention.k_norm)
        return hidden, queries, keys, values

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> Stream:
        """attended: (R, H, D). The layer's output: both residual branches added to `hidden`."""
        if len(hidden) == 1:
            return self._finish_row(hidden, attended)
        hidden, normed = Stream(hidden, self._attention.o_proj(attended.flatten(1))).normed(self._mlp_norm)
        return Stream(hidden, self._run_mlp(normed))

    def _finish_row(self, hidden: torch.Tensor, attended: torch.Tensor) -> Stream:
        """The same of a single row: what stands around its products is part of them."""
        out, mlp, before = self._attention.o_proj, self._mlp, self._mlp_norm
        hidden = linear_of_row(attended.flatten(1), out.weight, out.bias, residual=hidden)
        if not self._is_swiglu_without_bias:
            return Stream(hidden, self._run_mlp(norm(hidden, before)))
        inner = swiglu_of_row(hidden, mlp.gate_proj.weight, mlp.up_proj.weight, before.weight, before.variance_epsilon)
        return Stream(linear_of_row(inner, mlp.down_proj.weight, mlp.down_proj.bias, residual=hidden))

    def _run_mlp(self, normed: torch.Tensor) -> torch.Tensor:
        mlp = self._mlp
        if self._gate_up is not None:
            gate, up = linear(normed, *self._gate_up).chunk(2, dim=-1)
        elif self._is_swiglu:
            gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
        else:
            found: torch.Tensor = mlp(normed[None])[0]
            return found
        found = mlp.down_proj(silu_mul(gate, up))
        return found


def _joined_qkv(attention: Any) -> Joined:
    """What gives queries, keys and values in one product."""
    if hasattr(attention, "qkv_proj"):
        return attention.qkv_proj.weight, attention.qkv_proj.bias
    return _join(attention.q_proj, attention.k_proj, attention.v_proj)


def _joined_gate_up(mlp: Any) -> Joined | None:
    """What gives a gated MLP's gate and up in one product; None where there is no such MLP, or where two are faster.

    On a GPU one takes less time, above all with few rows. On a CPU the two results would lie between each other, which
    costs more than it saves.
    """
    if hasattr(mlp, "gate_up_proj"):
        return mlp.gate_up_proj.weight, mlp.gate_up_proj.bias
    is_faster = hasattr(mlp, "gate_proj") and mlp.gate_proj.weight.device.type == "cuda"
    return _join(mlp.gate_proj, mlp.up_proj) if is_faster else None


def _join(*projections: Any) -> Joined:
    """Weight and bias of one product that stands for several of the same input.

    Theirs become views of it: no weight is held twice, and the model's own forward still works.
    """
    sizes = [p.weight.shape[0] for p in projections]
    joined: list[torch.Tensor | None] = []
    for name in ("weight", "bias"):
        parts = [getattr(p, name) for p in projections]
        whole = None if parts[0] is None else torch.cat([part.data for part in parts])
        if whole is not None:
            for part, view in zip(parts, whole.split(sizes), strict=True):  # type: ignore[no-untyped-call]
                part.data = view
        joined.append(whole)
    weight, bias = joined
    assert weight is not None
    return weight, bias


def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    """RMS norm over the last dimension by torch's own operator, which is one kernel on CUDA."""
    return rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


class Decoder:
    """A transformers decoder (the part without the head), run row by row."""

    def __init__(self, hf: Any, config: Any) -> None:
        self._embed, self._norm = hf.embed_tokens, hf.norm
        self.layers = [DecoderLayer(layer, config) for layer in hf.layers]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: (R,) → (R, hidden size)."""
        hidden: torch.Tensor = self._embed(token_ids)
        return hidden

    def run(self, hidden: torch.Tensor, step: ForwardStep, layers: range) -> torch.Tensor:
        """hidden: (R, hidden size), of all rows. Returns what comes out of the last of these layers.

        Of the model's last layer that is (W, hidden size), the step's wanted rows in order. Rows leave a layer behind
        their keys and values: what would come out of it for them, nothing reads.
        """
        last, stream = len(self.layers) - 1, Stream(hidden)
        for i in layers:
            layer = self.layers[i]
            hidden, queries, keys, values = layer.project(stream)
            queries = step.write(i, queries, keys, values)
            if (leaving := step.exit_from(i, i == last)) is not None:
                hidden, queries, step = hidden[leaving.rows], queries[leaving.rows], leaving.step
                if not len(hidden):
                    return hidden
            stream = layer.finish(hidden, step.attend(i, queries, layer.scaling, layer.window))
        hidden = stream.total()
        return hidden[step.wanted] if last in layers and step.is_watched(last) else hidden

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head takes."""
        return norm(hidden, self._norm)
