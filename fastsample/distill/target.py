"""What a consistency method aims at, the student itself or an average of it, and how far from it that is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastsample.checks import real
from fastsample.distill.student import Student
from fastsample.train.checkpoint import State
from fastsample.train.run import follow

_C = 0.001
_BEYOND = 0.1  # of a bound: where a clipped student aims, so that its noise is cut off


class Target:
    """f', which is the student where decay is 0, and else target <- decay target + (1 - decay) student.

    Raises:
        ValueError, TypeError: a decay out of [0, 1).
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= real("target_decay", decay) < 1:
            raise ValueError(f"target_decay must lie in [0, 1), got {decay}")
        self.decay = float(decay)
        self.average: nn.Module | None = None
        self._kept: State | None = None

    def of(self, student: Any) -> Any:
        """What is called as f'."""
        return self.average or student

    def begin(self, student: Student) -> None:
        """Copies the student, or takes up what a checkpoint had."""
        # Only now: processes that began with other random weights have taken over the first one's.
        if self.decay and self.average is None:
            self.average = copy.deepcopy(student).requires_grad_(False)
            if self._kept is not None:
                self.average.load_state_dict(self._kept)

    def follow(self, student: Student) -> None:
        """Moves towards the student."""
        if self.average is not None:
            follow(self.average, student, 1 - self.decay)

    def state(self) -> State:
        """What a checkpoint holds of it."""
        return {} if self.average is None else {"target": self.average.state_dict()}

    def take(self, state: State) -> None:
        """Takes over such a state when it begins."""
        self._kept = state.get("target")


def bounded(target: Tensor, mine: Tensor, clip: float | None) -> Tensor:
    """The target as a sampler clips it, but a tenth beyond where that is a bound; further out is as good as there.

    So a clipped student leaves no noise in what lies at a bound, such as black: what is left of it is cut off.

    Args:
        target, mine: what is aimed at, and what the student makes, of one shape.
        clip: of the sampler, or None.

    Example:
        >>> import torch
        >>> mine = torch.tensor([-1.2, -0.9, 0.3, 0.9, 1.2])
        >>> bounded(torch.tensor([-1.1, -1.1, 0.5, 0.5, 0.5]), mine, 1.0)
        tensor([-1.2000, -1.1000,  0.5000,  0.5000,  0.5000])
    """
    if clip is None:
        return target
    target = target.clamp(-clip, clip)
    aim = torch.where(target.abs() >= clip, (1 + _BEYOND) * target, target)
    beyond = torch.where(target < 0, mine < aim, mine > aim) & (target.abs() >= clip)
    return torch.where(beyond, mine.detach(), aim)


def huber(squares: Tensor) -> Tensor:
    """sqrt(d^2 + c^2) - c of squares d^2, c = 0.001: all but |d|, with a gradient that vanishes at 0."""
    return (squares + _C**2).sqrt() - _C
