"""Attention of a dense run of rows: positions [N - R, N) of one request, each over all positions up to its own.

That is what a full prefill is, or a piece of one behind what is there already, and what libraries have made fastest.
Which of them serves is chosen once, tried once on the shapes that it will get, and compared with plain torch there.
Everything else is `rows_attention`'s, which also serves where no library does. Knows nothing of requests or layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from fusionrag.errors import ConfigError
from fusionrag.kernels.backend import has_wgmma

log = logging.getLogger(__name__)
FLASH_MODULES = (  # in order of preference
    ("flash_attn_interface", "flash-attn 3"),
    ("flash_attn.cute", "flash-attn 4"),
    ("flash_attn", "flash-attn 2"),
)
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]  # in order of preference
DTYPES = (torch.bfloat16, torch.float16)
# 32K rows of Qwen2.5-7B's heads on an H100: rows attention 18.8 ms (the Hopper kernel,
# where it is asked for, 13.3), SDPA's FlashAttention 21.8 ms, its cuDNN 11.5 ms,
# which plans anew for every length
HOPPER = "on Hopper it is faster than torch's FlashAttention, and cuDNN would plan anew for every length"
MIN_ROWS = 256  # fewer do not fill a GPU, and only `rows_attention` splits their keys
TRIAL = (160, 96)  # rows, and positions in front of them
TOLERANCE = 0.05  # of outputs of size 1 in half precision; another mask would be off by much more

Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


class Unavailable(Exception):
    """A library that is not there, or does not work here; says why."""


@dataclass(frozen=True)
class DenseAttention:
    """What was chosen and why. `function` is None where `rows_attention` serves dense runs as well."""

    name: str
    why: str
    function: Function | None = None

    def takes(self, num_rows: int, num_keys: int, window: int | None) -> bool:
        """Whether a run of so many rows, the last of which sees `num_keys`, is worth handing over."""
        return self.function is not None and num_rows >= MIN_ROWS and (window is None or num_keys <= window)

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """queries (R, H, D), rotated; keys, values (G, N, D), R <= N. Row i sees keys [0, N - R + i]. (R, H, D)."""
        assert self.function is not None
        return self.function(queries, keys, values, scaling)


def choose_dense(
    wanted: str, device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> DenseAttention:
    """wanted: auto, flash-attn, sdpa or rows. Raises ConfigError where a library asked for by name does not work here.

    `auto` takes the first that works, and warns of those that are there and do not.
    """
    if device.type != "cuda":
        if wanted in ("flash-attn", "sdpa"):
            raise ConfigError(
                "dense_attention", f"{wanted} serves GPUs only; the model is on the {device.type.upper()}"
            )
        return DenseAttention("rows", f"it serves all rows on a {device.type.upper()}")
    if wanted == "rows":
        return DenseAttention("rows", "asked for")
    if dtype not in DTYPES:
        reason = f"no library takes {str(dtype).removeprefix('torch.')}"
        if wanted != "auto":
            raise ConfigError("dense_attention", reason)
        return DenseAttention("rows", reason)
    makers = {"flash-attn": _flash_attention, "sdpa": _sdpa}
    refused: list[str] = []
    for name, make in makers.items():
        if wanted not in ("auto", name):
            continue
        if wanted == "auto" and name == "sdpa" and has_wgmma(device):
            return DenseAttention("rows", "; ".join([HOPPER, *refused]))
        try:
            found, function = make()
            try_out(function, device, dtype, num_heads, num_kv_heads, head_dim)
        except Unavailable as error:
            refused.append(f"{name}: {error}")
        else:
            why = "asked for" if wanted != "auto" else "the first that works"
            return DenseAttention(found, "; ".join([why, *refused]), function)
    if wanted != "auto":
        raise ConfigError("dense_attention", refused[0])
    log.warning("dense prefill runs on rows attention: %s", "; ".join(refused))
    return DenseAttention("rows", "; ".join(refused))


def try_out(
    function: Function, device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    """Runs it on a whole prompt and on a piece of one. Raises Unavailable unless it gives what plain torch gives."""
    num_rows, num_before = TRIAL
    draw = torch.Generator().manual_seed(0)
    for num_keys in (num_rows, num_rows + num_before):
        sizes = ((num_rows, num_heads), (num_kv_heads, num_keys), (num_kv_heads, num_keys))
        queries, keys, values = (torch.randn(*s, head_dim, generator=draw).to(device, dtype) for s in sizes)
        expected = dense_reference(queries, keys, values, head_dim**-0.5)
        try:
            found = function(queries, keys, values, head_dim**-0.5)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a library raises for a GPU or a shape that it does not serve
            told = str(error).partition("\n")[0][:200]
            raise Unavailable(f"does not run here ({type(error).__name__}: {told})") from error
        worst = float((found.float() - expected.float()).abs().max())
        if not worst <= TOLERANCE:
            raise Unavailable(f"differs from plain torch by {worst:.3g}")


def dense_reference(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Plain torch: same arguments, same result."""
    num_rows, num_keys = len(queries), keys.shape[1]
    seen = torch.ones(num_rows, num_keys, dtype=torch.bool, device=queries.device).tril(num_keys - num_rows)
    grouped = queries.transpose(0, 1)[None].float()
    found = scaled_dot_product_attention(
        grouped, keys[None].float(), values[None].float(), seen, scale=scaling, enable_gqa=len(keys) != grouped.shape[1]
    )
    return found[0].transpose(0, 1).to(queries.dtype)


def _flash_attention() -> tuple[str, Function]:
    """The first flash-attn that can be imported. Raises Unavailable with what came of each."""
    told = []
    for module, name in FLASH_MODULES:
        try:
            function = import_module(module).flash_attn_func
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, AttributeError, RuntimeError) as error:  # built for another torch, or another GPU
            told.append(f"{name} cannot be imported ({str(error)[:200]})")
        else:
            return name, partial(flash_attention, function)
    raise Unavailable("; ".join(told) or "not installed")


def flash_attention(
    function: Callable[..., Any], queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> torch.Tensor:
    """function: `flash_attn_func` of flash-attn 2.1 or later; (batch, rows, heads, D), causal from the lower right."""
    own_keys, own_values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    found = function(queries[None], own_keys, own_values, softmax_scale=scaling, causal=True)
    out: torch.Tensor = (
        found[0] if isinstance(found, tuple) else found
    )  # some versions add the log of the softmax's sum
    return out[0]


def _sdpa() -> tuple[str, Function]:
    version = torch.__version__.partition("+")[0]
    return f"torch {version} SDPA ({' or '.join(b.name.split('_')[0].lower() for b in SDPA_BACKENDS)})", sdpa


def sdpa(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """torch's own fused kernels and nothing else: what would make the whole matrix of scores raises instead."""
    num_rows, num_keys, is_grouped = len(queries), keys.shape[1], queries.shape[1] != len(keys)
    mask = None if num_rows == num_keys else causal_lower_right(num_rows, num_keys)
    with sdpa_kernel(SDPA_BACKENDS, set_priority=True):
        found = scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=is_grouped,
        )
    return found[0].transpose(0, 1)
