"""Inpainting: the known region follows the forward process while the rest is sampled (Lugmayr et al. 2022, without
resampling; CompVis' DDIMSampler with mask=)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.ops.noise import randn
from fastsample.tables import Table

KNOWN = 2  # the stream of the known region's noise


class Inpainting:
    """x becomes mask*x + (1 - mask)*(alpha*known + sigma*z) after every row, at the level that the row leads to.

    Raises:
        TypeError, ValueError: where only one of mask and known is given, for values that are no tensors or do not
            broadcast to the state, for a mask outside [0, 1] and for a table without noise levels.
    """

    def __init__(self, mask: Tensor, known: Tensor, state: Tensor, table: Table, seeds: Tensor) -> None:
        if not isinstance(mask, Tensor) or not isinstance(known, Tensor):
            raise TypeError("inpainting needs both mask= and known=, as tensors")
        if table.alpha is None or table.sigma is None:
            raise ValueError("inpainting needs a table with noise levels: Table(..., alpha=, sigma=)")
        expanded = {}
        for name, given in (("mask", mask), ("known", known)):
            values = given.to(state.device, state.dtype)
            try:
                expanded[name] = values.expand(state.shape)
            except RuntimeError:
                raise ValueError(
                    f"{name} must broadcast to x's shape {tuple(state.shape)}, got {tuple(values.shape)}"
                ) from None
        self._mask = expanded["mask"]
        if not ((self._mask >= 0) & (self._mask <= 1)).all():
            raise ValueError("mask must lie in [0, 1]: 1 where x is to be filled in, 0 where it is known")
        self._rest = 1 - self._mask
        self._kept = self._rest * expanded["known"]
        self._levels = list(zip(table.alpha.tolist(), table.sigma.tolist(), strict=True))[1:]
        self._seeds = seeds
        self._noise = torch.empty(state.shape, dtype=torch.float32, device=state.device)

    def apply(self, state: Tensor, k: int) -> None:
        """Puts the known region into the state after row k, in place."""
        alpha, sigma = self._levels[k]
        state.mul_(self._mask).add_(self._kept, alpha=alpha)
        if sigma > 0:
            z = randn(state.shape, seed=self._seeds, step=k, stream=KNOWN, out=self._noise)
            state.addcmul_(self._rest, z.to(state.dtype), value=sigma)
