"""The model's input: the state itself, or a buffer that the step fills in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.ops.backend import fresh


class ModelInput:
    """Where the state lives and where the model reads it: cast, scaled and, under guidance, twice.

    In the state's own dtype and scale the state is what the model reads; under guidance it then is the second half of a
    buffer for both, so that a step writes the other half only.

    Attributes:
        state: the state, holding what it was made from.
        target: what a step writes the next input to; None where the state is enough.
        targets: its halves under guidance, else itself or nothing.
        views: what the model is called with where a row is not guided, and where it is.
    """

    def __init__(self, state: Tensor, dtype: torch.dtype, *, scaled: bool, guided: bool) -> None:
        batch = len(state)
        self._own = dtype == state.dtype and not scaled
        shape = torch.Size((2 * batch, *state.shape[1:])) if guided else state.shape
        self.state, self.target = state, None
        self._whole = state
        if guided or not self._own:
            self._whole = fresh(shape, dtype, state.device)
            self.target = self._whole
        if guided and self._own:
            self.target, self.state = self._whole.split(batch)
            self.state.copy_(state)
        self.views = self._whole[-batch:] if guided else self._whole, self._whole
        self.targets = () if self.target is None else self.target.split(batch)

    def fill(self, scale: float) -> None:
        """Makes the input from the state as it is now."""
        for target in self.targets:
            target.copy_(self.state) if scale == 1.0 else torch.mul(self.state, scale, out=target)

    @property
    def needed(self) -> tuple[bool, bool]:
        """Whether a step has to write `target` for a row that is not guided, and for one that is."""
        return self.target is not None and not self._own, self.target is not None

    def result(self) -> Tensor:
        """The state, in storage of its own."""
        return self.state if self._whole is self.state or not self._own else self.state.clone()
