"""Distillation along the student's own path from noise, without data (SFD, Zhou et al. 2024).

A fine solver of the teacher goes from noise x_T to a sample, and the states at the student's N timesteps are kept as
targets y_1 .. y_N. The student goes the same way in N DDIM steps, and after each of them

    loss_k = mean |x_k - y_k|,  x_k = DDIM step of the student from its own x_(k - 1), taken as given

moves its weights. So every step learns to make good what the steps before it have left, and nothing but noise and
conditions is needed. The teacher may be guided: the student then gives guided samples in one call a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from fastsample.checks import integer
from fastsample.distill.common import Common, run
from fastsample.distill.grid import nested_timesteps
from fastsample.distill.guidance_range import spread, take_range
from fastsample.distill.method import Batch, Method
from fastsample.distill.paths import FOLDER, Paths
from fastsample.distill.settings import Settings
from fastsample.distill.student import Facts, Student
from fastsample.distill.teacher import Teacher
from fastsample.model import Model
from fastsample.ops.noise import randn
from fastsample.ops.step import step
from fastsample.samplers.ddim import DDIM
from fastsample.samplers.dpm_solver import DPMSolver
from fastsample.times.predictions import Prediction
from fastsample.train.processes import Processes

# The streams 0 to 2 are those of samplers: noise that a student is judged by should not be what it was trained on.
_STREAM = 3
_GOLDEN = (5**0.5 - 1) / 2
_CHUNK = 64  # paths that are made at once and share a file
DEFAULTS = Settings(iterations=1000)


def trajectory(
    teacher: Model,
    shape: Sequence[int],
    out: str | Path,
    *,
    steps: int | Sequence[int] = 4,
    substeps: int = 6,
    paths: int = 4096,
    **common: Unpack[Common],
) -> Student:
    """Distils a model to so many steps along the student's own path, without data: the method to try first.

    Args:
        teacher: any model that samplers take, `model(x, t, **keywords)`.
        shape: of one sample, such as (3, 32, 32).
        out: the folder of the run: student.safetensors, checkpoint.pt, loss.csv, loss.png, and paths/ while it runs.
        steps: N, of the student. Several, such as (4, 2, 1), make one student for all of them, whose network is told
            the number as its keyword `steps`; they must divide the largest.
        substeps: steps of the teacher's DPM-Solver++ 3M in each of the student's (of the largest N).
        paths: how many paths of the teacher are made and kept on disk, 4 N bytes for each number of a sample.
        **common: see distill.Common.

    Returns:
        The student, see distill.Student.

    Raises:
        ValueError, TypeError: arguments that cannot work, or a folder of another run, before anything is computed.
        ArithmeticError: the loss, its gradient or a weight is not finite; the last checkpoint is from before that.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from fastsample import Schedule, zoo
        >>> teacher = zoo.UNet(zoo.UNetConfig(widths=(8, 16)), Schedule.cosine(100)).eval()
        >>> short = {"settings": Settings(iterations=1, batch_size=2), "progress": False}
        >>> with TemporaryDirectory() as out:
        ...     student = trajectory(teacher, (1, 28, 28), out, steps=2, paths=2, cond={"y": torch.arange(10)}, **short)
        >>> student.sample((3, 1, 28, 28), seed=0, y=torch.tensor([1, 2, 3])).shape
        torch.Size([3, 1, 28, 28])
    """
    counts = (steps,) if isinstance(steps, int | np.integer) else tuple(steps)
    weights = take_range(common)

    def make(model: Teacher, student: Student, settings: Settings) -> Trajectory:
        return Trajectory(model, student.prediction, counts, substeps, paths, settings.seed, weights)

    return run(teacher, shape, out, make, DEFAULTS, told=_told(counts, weights), **common)


def _told(counts: Sequence[int], weights: tuple[float, float] | None) -> tuple[str, ...]:
    """What a network must be told: what it was distilled for several of."""
    several = {"steps": len(counts) > 1, "guidance": weights is not None}
    return tuple(name for name, told in several.items() if told)


class Trajectory(Method):
    """The method for students of so many steps.

    Args:
        teacher: the teacher.
        prediction: of the student.
        counts: the numbers of steps of the student.
        substeps: solver steps of the teacher in each step, of the largest of them.
        paths: how many paths of the teacher are made; batches are drawn from them.
        seed: of their noise.
        weights: (least, most) of guidance; None for the teacher's own.
    """

    name = "trajectory"

    def __init__(
        self,
        teacher: Teacher,
        prediction: Prediction,
        counts: Sequence[int],
        substeps: int,
        paths: int,
        seed: int,
        weights: tuple[float, float] | None = None,
    ) -> None:
        self.counts = sorted({integer("steps", count, 1) for count in counts}, reverse=True)
        if not self.counts or any(self.counts[0] % count for count in self.counts):
            raise ValueError(f"steps must be numbers that divide the largest of them, got {tuple(counts)}")
        self.updates, self.substeps = self.counts[0], integer("substeps", substeps, 1)
        self.paths, self.seed, self.weights = integer("paths", paths, 1), seed, weights
        self.teacher, start = teacher, teacher.start(prediction)
        self.timesteps = {count: nested_timesteps(start, count) for count in self.counts}
        self.tables = {
            count: DDIM(teacher.schedule, timesteps=timesteps, prediction=prediction).table
            for count, timesteps in self.timesteps.items()
        }
        fine = nested_timesteps(start, self.updates * self.substeps)
        self.solver = DPMSolver(
            teacher.schedule, timesteps=fine, order=3, prediction=teacher.prediction, clip=teacher.clip
        )

    def identity(self) -> dict[str, Any]:
        own = {"student_steps": self.counts, "substeps": self.substeps, "paths": self.paths, "weights": self.weights}
        return self.teacher.identity() | own

    def facts(self, stage: int) -> Facts:
        teacher = self.teacher
        return Facts(
            self.name,
            tuple(teacher.shape),
            self.timesteps,
            guidance=self.weights or teacher.guidance,
            clip=teacher.clip,
            teacher=teacher.digest,
            told=_told(self.counts, self.weights),
            settings={"substeps": self.substeps, "paths": self.paths, "seed": self.seed},
        )

    def check_place(self, out: Path, taken_up: bool) -> None:
        folder = out / FOLDER
        if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and taken_up)):
            raise ValueError(f"{out} holds {FOLDER} but no checkpoint of a run: use another folder")

    def begin(self, stage: int, student: Student, out: Path, processes: Processes, progress: bool) -> None:
        self.kept = self._paths(out)
        self.kept.make(processes, progress)

    def end(self, out: Path) -> None:
        self._paths(out).remove()

    def losses(self, student: Any, stage: int, batch: Batch) -> Iterator[Tensor]:
        # So many whole paths as make up the updates: one of the most steps, or several of fewer.
        count = self.counts[int(torch.randint(len(self.counts), (), generator=batch.generator))]
        table, every = self.tables[count], self.updates // count
        for _ in range(every):
            places = batch.integers(self.paths).cpu()  # where paths and their noise are kept
            told = dict(self.teacher.told(self._examples(places))) | self._told(places, count, batch.device)
            x = self._noise(places).to(batch.device)
            for k, target in enumerate(self.kept.at(places)[every - 1 :: every].to(batch.device)):
                t = torch.full((len(x),), int(table.t[k]), device=x.device)
                moved = step(x, student(x, t, **told).float(), table, k)
                yield (moved - target).abs().mean()
                x = moved.detach()

    def _told(self, places: Tensor, count: int, device: torch.device) -> dict[str, Tensor]:
        """What the network is told of the steps and the guidance of these paths, where it is told any."""
        told = {}
        if len(self.counts) > 1:
            told["steps"] = torch.full((len(places),), float(count), device=device)
        weights = self._weights(places)
        if weights is not None:
            told["guidance"] = weights.to(device)
        return told

    def _paths(self, out: Path) -> Paths:
        return Paths(out, self.paths, _CHUNK, self._targets)

    def _targets(self, places: Tensor) -> Tensor:
        x, device = self._noise(places).to(self.teacher.device), self.teacher.device
        weights = self._weights(places)
        weights = None if weights is None else weights.to(device)
        return self.teacher.path(self.solver, x, self._examples(places), self.substeps, weights)

    def _noise(self, places: Tensor) -> Tensor:
        """x_T of these paths: places of the set of noise that the seed names."""
        return randn((len(places), *self.teacher.shape), seed=self.seed, index=places, stream=_STREAM)

    def _weights(self, places: Tensor) -> Tensor | None:
        """The guidance of these paths, which fill the range whatever their number."""
        return None if self.weights is None else spread((places.double() + 0.5) * _GOLDEN % 1, self.weights).float()

    def _examples(self, places: Tensor) -> Tensor:
        """Which conditions these paths have: all in turn, so that they are balanced."""
        return places % self.teacher.conditions.count
