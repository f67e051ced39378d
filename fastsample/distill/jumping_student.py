"""Students each of whose calls leads to a clean sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.distill.student import Student


class JumpingStudent(Student):
    """A student that jumps to x0 from any of its timesteps. At timestep -1, clean data, it stays where it is.

    Subclasses set `of`: by timestep, float32 (2, T), what x0 is of the state and of the model's output.
    """

    of: Tensor

    def clean(self, output: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """x0 of the output for states x = alpha clean + sigma z at timesteps (B,); x itself at -1."""
        of = self.of.to(x.device)[:, timestep.clamp(min=0)]
        of_x, of_output = torch.where(
            timestep < 0, torch.tensor([[1.0], [0.0]], dtype=torch.float32, device=x.device), of
        )
        shape = (-1, *(1,) * (x.ndim - 1))
        return of_x.reshape(shape) * x + of_output.reshape(shape) * output
