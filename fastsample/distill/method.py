"""What tells one method of distillation from another; the frame in distill.run does the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from fastsample.distill.student import Facts, Student
from fastsample.train.checkpoint import State
from fastsample.train.processes import Processes


@dataclass(frozen=True)
class Batch:
    """What is random in one iteration, and how this process takes its part of it.

    Args:
        generator: seeded by (seed, stage, iteration), alike in all processes.
        size: samples of the whole batch, over all processes.
        place: (first, last + 1) of the samples that this call computes.
        device: where it computes.
        iteration: its number in the stage, from 0.
    """

    generator: Generator
    size: int
    place: tuple[int, int]
    device: torch.device
    iteration: int

    def part(self, whole: Tensor) -> Tensor:
        """This call's share of what has an entry per sample of the whole batch."""
        return whole[self.place[0] : self.place[1]].to(self.device)

    def integers(self, end: int) -> Tensor:
        """Numbers from 0 to end - 1, int64, one per sample of this call."""
        return self.part(torch.randint(end, (self.size,), generator=self.generator, device="cpu"))

    def normals(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normals, float32 (B, *shape)."""
        return self.part(torch.randn(self.size, *shape, generator=self.generator, device="cpu"))

    def shares(self) -> Tensor:
        """Numbers between 0 and 1, float32, one per sample of this call."""
        return self.part(torch.rand(self.size, generator=self.generator, dtype=torch.float32, device="cpu"))


class Method:
    """The mathematics of one method.

    Attributes:
        name: as its function and command have it.
        stages: how often training begins anew, each time from the last stage's student.
        updates: optimizer steps of an iteration.
    """

    name: str
    stages: int = 1
    updates: int = 1

    def identity(self) -> dict[str, Any]:
        """All of the method that decides the outcome, as texts and numbers."""
        raise NotImplementedError

    def facts(self, stage: int) -> Facts:
        """What the student of this stage says of itself."""
        raise NotImplementedError

    def losses(self, student: Any, stage: int, batch: Batch) -> Iterator[Tensor]:
        """The losses of an iteration, `updates` of them; the weights move after each.

        Args:
            student: called as student(x, t, **keywords), returns the prediction.
            stage: counted from 0.
            batch: what is random in it.
        """
        raise NotImplementedError

    def file(self, stage: int) -> str:
        """Where the student of a stage is kept in the folder of the run."""
        return "student.safetensors"

    def check_place(self, out: Path, taken_up: bool) -> None:
        """Raises ValueError where the folder holds what this method would write, and no checkpoint of a run."""

    def begin(self, stage: int, student: Student, out: Path, processes: Processes, progress: bool) -> None:
        """Called before a stage, and where a run is taken up within one, with the student that it began with."""

    def end(self, out: Path) -> None:
        """Called when a run is complete."""

    def moved(self, student: Student) -> None:
        """Called after the weights have moved."""

    def state(self) -> State:
        """What the method itself keeps from step to step, for a checkpoint."""
        return {}

    def take(self, state: State) -> None:
        """Takes over such a state."""
