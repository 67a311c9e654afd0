"""Rotary position embedding, applied by us instead of by the model, so that keys can be stored before rotation (I3).

The table is the model's own (`inv_freq` and `attention_scaling` of its rotary module, which covers default, linear,
Llama-3 and YaRN scaling). A RoPE kind whose table depends on the length of the sequence cannot be re-rotated and is
refused by name (`extract_rope`). Rotation is done in fp32 whatever the dtype of the keys.

Convention: the two halves of the rotary dimensions form the pairs (i, i + rotary_dim/2), as in all supported families.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusionrag.errors import UnsupportedModel
from fusionrag.kernels.prepare_rows import rotate

POSITION_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class Rope:
    """inv_freq: (rotary_dim / 2,) fp32. `scaling` multiplies cos and sin (YaRN); 1 otherwise."""

    inv_freq: torch.Tensor
    scaling: float = 1.0

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.shape[0]

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin: (R, rotary_dim / 2) fp32 for positions (R,)."""
        angles = positions.to(self.inv_freq.device, torch.float32)[:, None] * self.inv_freq
        return angles.cos() * self.scaling, angles.sin() * self.scaling

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: (..., R, D), cos and sin from `tables`: a new tensor of x's dtype, rotated in fp32."""
        return rotate(x, cos, sin)

    def shift(self, rotated: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Moves rotated keys (..., R, D) by `delta` (R,) positions; the table's scaling is not applied twice."""
        cos, sin = self.tables(delta)
        return self.rotate(rotated, cos / self.scaling, sin / self.scaling)


def extract_rope(rotary: torch.nn.Module, max_position: int) -> Rope:
    """The static table of a transformers rotary module. Raises UnsupportedModel if there is none.

    Not only the name of the RoPE kind is checked: the module is asked for cos and sin at a near and at the farthest
    position, and must agree with the table. A kind that is unknown or position-dependent can thus never pass silently.
    """
    kind = getattr(rotary, "rope_type", "default")
    if kind in POSITION_DEPENDENT:
        raise UnsupportedModel(
            f"RoPE kind {kind!r} depends on the length of the sequence, so stored keys cannot be moved; "
            "use a model with default, linear, llama3 or yarn RoPE"
        )
    inv_freq = getattr(rotary, "inv_freq", None)
    if not isinstance(inv_freq, torch.Tensor):
        raise UnsupportedModel(f"{type(rotary).__name__} has no single table of frequencies (RoPE kind {kind!r})")
    rope = Rope(inv_freq.detach().float().clone(), float(getattr(rotary, "attention_scaling", 1.0)))
    for position in (1, max_position - 1):
        positions = torch.tensor([0, position], device=inv_freq.device)
        probe = torch.zeros(1, device=inv_freq.device, dtype=torch.float32)
        cos, sin = rotary(probe, positions[None])
        ours_cos, ours_sin = rope.tables(positions)
        half = ours_cos.shape[1]
        same = torch.equal(cos[0, :, :half], cos[0, :, half:]) and cos.shape[-1] == 2 * half
        if not (same and torch.allclose(cos[0, :, :half], ours_cos) and torch.allclose(sin[0, :, :half], ours_sin)):
            raise UnsupportedModel(f"{type(rotary).__name__} (RoPE kind {kind!r}) is not a static rotation by halves")
    return rope
