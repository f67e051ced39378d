"""Which timesteps a training step looks at: all alike, or those whose losses are large more often."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastsample.checks import integer, real
from fastsample.train.processes import gathered


class TimestepSampler(Protocol):
    """Draws timesteps and is told the losses there."""

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(t, weights), int64 and float32, each (count,) on the CPU.

        With t drawn from p, weights 1 / (T p_t) keep the mean of weights * loss what it is for uniform t.
        """
        ...

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Takes the losses, unweighted, (B,), that were found at t; every process calls it with its own part."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What it has learned."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what another one has learned."""
        ...


class UniformTimesteps:
    """t uniform in 0 .. T - 1, all weights 1.

    Args:
        T: number of timesteps.

    Example:
        >>> t, weights = UniformTimesteps(1000).sample(3, torch.Generator().manual_seed(0))
        >>> weights
        tensor([1., 1., 1.])
    """

    def __init__(self, T: int) -> None:
        self.T = integer("T", T, 1)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See TimestepSampler."""
        t = torch.randint(self.T, (count,), generator=generator, device="cpu")
        return t, torch.ones(count, dtype=torch.float32, device="cpu")

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state that is not empty."""
        if state:
            raise ValueError(f"uniform timesteps have no state, got {sorted(state)}")


class ImportanceTimesteps:
    """Importance sampling by the losses' second moments (Nichol & Dhariwal 2021; "loss-second-moment" there).

        p_t = (1 - share) sqrt(E[loss_t^2]) / sum_t sqrt(E[loss_t^2]) + share / T

    The expectation is the mean over the last `history` losses at t. Until every t has that many, p is uniform.

    Args:
        T: number of timesteps.
        history: losses that are kept of each timestep.
        uniform_share: share of uniform sampling, so that no timestep is forgotten.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> sampler = ImportanceTimesteps(2, history=1, uniform_share=0.0)
        >>> sampler.update(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
        >>> sampler.probabilities()
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """

    def __init__(self, T: int, history: int = 10, uniform_share: float = 0.001) -> None:
        self.T = integer("T", T, 1)
        self.uniform_share = real("uniform_share", uniform_share)
        if not 0 <= self.uniform_share <= 1:
            raise ValueError(f"uniform_share must lie in [0, 1], got {uniform_share}")
        self._losses = torch.zeros(self.T, integer("history", history, 1), dtype=torch.float64)
        self._counts = torch.zeros(self.T, dtype=torch.int64)

    @property
    def warm(self) -> bool:
        """Whether every timestep has its whole history."""
        return bool((self._counts == self._losses.shape[1]).all())

    def probabilities(self) -> Tensor:
        """p, float64 (T,)."""
        uniform = torch.full((self.T,), 1 / self.T, dtype=torch.float64)
        if not self.warm:
            return uniform
        moments = self._losses.square().mean(1).sqrt()
        total = moments.sum()
        if total == 0:  # nothing is left to learn anywhere
            return uniform
        return moments / total * (1 - self.uniform_share) + uniform * self.uniform_share

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See TimestepSampler."""
        p = self.probabilities()
        # Through the distribution function: multinomial takes no more than 2^24 timesteps, and sums in float32.
        ends = p.cumsum(0)
        where = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu") * ends[-1]
        t = torch.searchsorted(ends, where, right=True).clamp(max=self.T - 1)
        return t, (1 / (self.T * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """See TimestepSampler. Every process takes the losses of all of them, in their order.

        Raises:
            ValueError: for a t outside 0 .. T - 1, shapes that differ, or a loss that is not finite.
        """
        if t.shape != losses.shape or t.ndim != 1:
            raise ValueError(f"t and losses must have one shape (B,), got {tuple(t.shape)} and {tuple(losses.shape)}")
        if len(t) and (int(t.min()) < 0 or int(t.max()) >= self.T):
            raise ValueError(f"t must lie in [0, {self.T}), got {int(t.min())} .. {int(t.max())}")
        if not losses.isfinite().all():
            raise ValueError("losses must be finite")
        for step, loss in zip(*gathered(t.cpu(), losses.detach().double().cpu()), strict=True):
            count = self._counts[step]
            if count == self._losses.shape[1]:
                self._losses[step] = self._losses[step].roll(-1)
                self._losses[step, -1] = loss
            else:
                self._losses[step, count] = loss
                self._counts[step] += 1

    def state_dict(self) -> dict[str, Any]:
        """The history of losses."""
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another T or history."""
        for name, mine in (("losses", self._losses), ("counts", self._counts)):
            given = state.get(name)
            if not isinstance(given, Tensor) or given.shape != mine.shape or given.dtype != mine.dtype:
                raise ValueError(f"{name} of importance sampling must have shape {tuple(mine.shape)}")
            mine.copy_(given)


TIMESTEP_SAMPLERS = {"uniform": UniformTimesteps, "importance": ImportanceTimesteps}
