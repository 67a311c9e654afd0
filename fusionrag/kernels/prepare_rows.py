"""What happens to a layer's queries, keys and values before attention: rotation, and the write to the arena.

Knows nothing of requests. Rotation is in fp32 by halves: dimension i pairs with i + rotary_dim / 2 (`fusionrag.rope`).
"""

from __future__ import annotations

import torch


def prepare_rows_(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
) -> None:
    """Rotates `queries` in place; writes `keys`, rotated, and `values` at their slots.

    queries: (R, H, D). keys, values: (R, G, D). The last dimension is contiguous, other strides are free.
    cos, sin: (R, rotary_dim / 2) fp32, contiguous. slots: (R,) int64; a negative one is not written.
    arena_keys, arena_values: (G, S, D), one layer of the arena.
    """
    prepare_rows_reference_(queries, keys, values, cos, sin, slots, arena_keys, arena_values)


def prepare_rows_reference_(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
) -> None:
    """Plain torch: same arguments, same result; every slot must be one of the arena."""
    queries.copy_(rotate(queries, cos[:, None], sin[:, None]))
    arena_keys.index_copy_(1, slots, rotate(keys, cos[:, None], sin[:, None]).transpose(0, 1))
    arena_values.index_copy_(1, slots, values.transpose(0, 1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: (..., D); cos, sin: broadcast to (..., rotary_dim / 2). A new tensor of x's dtype, rotated in fp32."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if 2 * half < x.shape[-1]:  # partial rotary: the other dimensions carry no position
        out[..., 2 * half :] = x[..., 2 * half :]
    return out.to(x.dtype)
