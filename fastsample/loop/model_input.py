"""The model's input: the state itself, or a buffer that the step fills in the same pass."""

from __future__ import annotations

import torch

from fastsample.ops.memory import fresh


class ModelInput:
    """Where the state lives and where the model reads it: cast, scaled and, under guidance, twice.

    In the state's own dtype and scale the state is what the model reads; under guidance it then is the second half of a
    buffer for both, so that a step writes the other half only.

    Attributes:
        state: the state, uninitialised, of this shape and dtype.
        target: what a step writes the next input to; None where the state is enough.
        targets: its halves under guidance, else itself or nothing.
        views: what the model is called with where a row is not guided, and where it is.
        lends_state: whether the state is part of a larger buffer.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        model_dtype: torch.dtype,
        *,
        scaled: bool,
        guided: bool,
    ) -> None:
        batch = shape[0]
        self._own = model_dtype == dtype and not scaled
        self.lends_state = guided and self._own
        self.target = None
        if guided or not self._own:
            whole = torch.Size((2 * batch, *shape[1:])) if guided else shape
            self.target = fresh(whole, model_dtype, device)
        buffer = self.target
        if self.lends_state and buffer is not None:
            self.target, self.state = buffer.split(batch)
        else:
            self.state = fresh(shape, dtype, device)
        buffer = self.state if buffer is None else buffer
        # Not the buffers themselves: a model that gives x other memory, `x.data = ...`, must not free these.
        self.views = buffer[-batch:] if guided else buffer.detach(), buffer.detach()
        self.targets = () if self.target is None else self.target.split(batch)

    def fill(self, scale: float) -> None:
        """Makes the input from the state as it is now."""
        for target in self.targets:
            target.copy_(self.state) if scale == 1.0 else torch.mul(self.state, scale, out=target)

    @property
    def needed(self) -> tuple[bool, bool]:
        """Whether a step has to write `target` for a row that is not guided, and for one that is."""
        return self.target is not None and not self._own, self.target is not None
