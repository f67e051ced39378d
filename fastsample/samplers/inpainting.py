"""Inpainting: the known region follows the forward process while the rest is sampled (Lugmayr et al. 2022, without
resampling; CompVis' DDIMSampler with mask=)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.ops.noise import fill
from fastsample.tables import Table

KNOWN = 2  # the stream of the known region's noise


class Inpainting:
    """x becomes mask*x + (1 - mask)*(alpha*known + sigma*z) after every row, at the level that the row leads to.

    Raises:
        TypeError, ValueError: where only one of mask and known is given, for values that are no tensors or do not
            broadcast to the state, for a mask outside [0, 1] and for a table without noise levels.
    """

    def __init__(
        self, mask: Tensor | None, known: Tensor | None, state: Tensor, table: Table, keys: Tensor, backend: str
    ) -> None:
        if not isinstance(mask, Tensor) or not isinstance(known, Tensor):
            got = f"{type(mask).__name__} and {type(known).__name__}"
            raise TypeError(f"inpainting needs both mask= and known=, two tensors; got {got}")
        if table.alpha is None or table.sigma is None:
            raise ValueError("inpainting needs a table with noise levels: Table(..., alpha=, sigma=)")
        expanded = {}
        for name, given in (("mask", mask), ("known", known)):
            # A copy, since a graph writes other masks into it.
            values = given.to(state.device, state.dtype, copy=name == "mask")
            if name == "mask":
                self._given_mask = values
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
        # What is unknown may be NaN there.
        self._kept = torch.where(self._rest == 0, 0.0, self._rest * expanded["known"])
        # What is known is known in the end, also where the last row leaves some noise.
        self._table, self._levels = table, (*table.levels[:-1], (1.0, 0.0))
        self._keys, self._backend = keys, backend
        self._noise = torch.empty(state.shape, dtype=torch.float32, device=state.device)

    def like(self, mask: Tensor, known: Tensor) -> Inpainting:
        """The same with another mask and known region."""
        return Inpainting(mask, known, self._rest, self._table, self._keys, self._backend)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that mask and known came to; the mask in the shape that it was given in."""
        return self._given_mask, self._rest, self._kept

    def apply(self, state: Tensor, k: int) -> None:
        """Puts the known region into the state after row k, in place."""
        alpha, sigma = self._levels[k]
        state.mul_(self._mask).add_(self._kept, alpha=alpha)
        if sigma > 0:
            fill(self._noise, self._keys, k, KNOWN, self._backend)
            state.addcmul_(self._rest, self._noise.to(state.dtype), value=sigma)
