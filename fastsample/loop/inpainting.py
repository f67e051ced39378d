"""Inpainting: the known region follows the forward process while the rest is sampled (Lugmayr et al. 2022, without
resampling; CompVis' DDIMSampler with mask=)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.checks import check_has_values
from fastsample.ops.address import check_strided
from fastsample.ops.noise import fill
from fastsample.tables import Table

KNOWN = 2  # the stream of the known region's noise


class Inpainting:
    """x becomes mask*x + (1 - mask)*(alpha*known + sigma*z) after every row, at the level that the row leads to.

    Raises:
        TypeError, ValueError: where only one of mask and known is given, for values that are no tensors or whose axes
            do not fit the state's, for a mask outside [0, 1] and for a table without noise levels.
    """

    def __init__(
        self, mask: Tensor | None, known: Tensor | None, state: Tensor, table: Table, keys: Tensor, backend: str
    ) -> None:
        if not isinstance(mask, Tensor) or not isinstance(known, Tensor):
            got = f"{type(mask).__name__} and {type(known).__name__}"
            raise TypeError(f"inpainting needs both mask= and known=, two tensors; got {got}")
        if table.alpha is None or table.sigma is None:
            raise ValueError("inpainting needs a table with noise levels: Table(..., alpha=, sigma=)")
        for name, given in (("mask", mask), ("known", known)):
            check_strided(name, given)
            if given.is_complex():
                raise TypeError(f"{name} must hold real numbers, got {given.dtype}")
            if name == "mask" or not state.is_meta:
                check_has_values(name, given)
        expanded = {}
        for name, given in (("mask", mask), ("known", known)):
            # A copy, since a graph writes other masks into it.
            values = given.to(state.device, state.dtype, copy=name == "mask")
            if name == "mask":
                self._given_mask = values
            expanded[name] = _expanded(name, values, state.shape)
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

    def like(self, mask: Tensor | None, known: Tensor | None) -> Inpainting:
        """The same with another mask and known region."""
        return Inpainting(mask, known, self._rest, self._table, self._keys, self._backend)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the rows read, all of it: the mask in the shape that it was given in, 1 - mask, (1 - mask) known."""
        return self._given_mask, self._rest, self._kept

    def apply(self, state: Tensor, k: int) -> None:
        """Puts the known region into the state after row k, in place."""
        alpha, sigma = self._levels[k]
        state.mul_(self._mask).add_(self._kept, alpha=alpha)
        if sigma > 0:
            fill(self._noise, self._keys, k, KNOWN, self._backend)
            state.addcmul_(self._rest, self._noise.to(state.dtype), value=sigma)


def _expanded(name: str, values: Tensor, shape: torch.Size) -> Tensor:
    """The values for every element of x. How many axes they have says which ones: sizes could fit two ways."""
    lacks_one = 0 < values.ndim == len(shape) - 1
    per_sample = lacks_one and name == "mask" and len(shape) > 2
    try:
        if per_sample:
            return values.unsqueeze(1).expand(shape)
        if not lacks_one:
            return values.expand(shape)
    except RuntimeError:
        pass
    raise ValueError(_misfit(name, lacks_one, per_sample, values.shape, shape))


def _misfit(name: str, lacks_one: bool, per_sample: bool, got: torch.Size, shape: torch.Size) -> str:
    batch, *rest = shape
    wanted = f"{name} must broadcast to x's shape {tuple(shape)}, with as many axes"
    if per_sample:
        return (
            f"{wanted}, or without that of channels to {(batch, *rest[1:])}, got {tuple(got)}; for values per channel "
            f"give {(1, *rest)}"
        )
    if lacks_one and len(shape) > 2:
        return (
            f"{wanted}, got {tuple(got)}, which may lack the batch (then give {name}[None]) or the channels (then give "
            f"{name}[:, None])"
        )
    spatial = f", or without batch and channels to {tuple(rest[1:])}" if len(shape) > 2 else ""
    return f"{wanted}{spatial}, got {tuple(got)}"
