"""Progressive distillation (Salimans & Ho 2022): half as many steps, and half as many again.

A stage has a teacher of 2 N steps and a student of N. From x_t = alpha x0 + sigma z of a sample, at one of the
student's timesteps, two DDIM steps of the teacher lead to x_r at its next one. The student should get there in one:

    x* = (x_r - (sigma_r / sigma_t) x_t) / (alpha_r - (sigma_r / sigma_t) alpha_t)
    loss = mean max(1, alpha_t^2 / sigma_t^2) (x0 of the student - x*)^2

where (alpha_r, sigma_r) = (1, 0) after the last step, so that x* = x_r there. The student of one stage is the teacher
of the next. Guidance is that of the first teacher, and the students have it folded in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from fastsample.broadcast import per_sample
from fastsample.checks import integer
from fastsample.distill.common import Common, run
from fastsample.distill.data import Data, Samples
from fastsample.distill.grid import nested_timesteps
from fastsample.distill.method import Batch, Method
from fastsample.distill.settings import Settings
from fastsample.distill.student import Facts, Student
from fastsample.distill.teacher import Teacher
from fastsample.model import Model
from fastsample.samplers.ddim import DDIM
from fastsample.times.levels import noise_levels
from fastsample.times.predictions import x0_coefficients
from fastsample.train.processes import Processes

DEFAULTS = Settings(iterations=1000)


def progressive(
    teacher: Model,
    data: Data,
    out: str | Path,
    *,
    start: int = 16,
    steps: int = 1,
    **common: Unpack[Common],
) -> Student:
    """Distils a model to half as many steps again and again, from `start` to `steps`.

    Args:
        teacher: any model that samplers take, `model(x, t, **keywords)`.
        data: samples (N, ...), floating point as the teacher sees them, or images as fastsample.train takes them, whose
            labels become cond={"y": labels}. With tensors, `cond` has an entry for each sample.
        out: the folder of the run: student-8.safetensors and so on, one per stage, checkpoint.pt, loss.csv, loss.png.
        start: the steps of the first stage's student, a power of two times `steps`; the teacher takes twice as many.
        steps: those of the last one.
        **common: see distill.Common.

    Returns:
        The student of the last stage; distill.load has those of all from their files.

    Raises:
        ValueError, TypeError: arguments that cannot work, or a folder of another run, before anything is computed.
        ArithmeticError: the loss, its gradient or a weight is not finite; the last checkpoint is from before that.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from fastsample import Schedule, zoo
        >>> teacher = zoo.UNet(zoo.UNetConfig(widths=(8, 16)), Schedule.cosine(100)).eval()
        >>> short = {"settings": Settings(iterations=1, batch_size=2), "progress": False}
        >>> with TemporaryDirectory() as out:
        ...     student = progressive(teacher, torch.zeros(5, 1, 28, 28), out, start=2, **short)
        >>> student.steps(), student.sample((3, 1, 28, 28), seed=0).shape
        ((1,), torch.Size([3, 1, 28, 28]))
    """
    samples = Samples(data, common)
    halvings = halvings_of(start, steps)
    start = int(start)

    def make(model: Teacher, student: Student, settings: Settings) -> Progressive:
        return Progressive(model, samples, student.prediction, start, halvings)

    return run(teacher, samples.shape, out, make, DEFAULTS, **samples.common)


def halvings_of(start: int, steps: int) -> int:
    """How often `start` steps are halved until there are `steps`. Raises ValueError where that cannot be."""
    start, steps = integer("start", start, 1), integer("steps", steps, 1)
    halvings = int(np.log2(start / steps)) if start >= steps else -1
    if steps * 2 ** max(halvings, 0) != start:
        raise ValueError(f"start must be a power of two times steps = {steps}, got {start}")
    return halvings


class Progressive(Method):
    """The method for students of `start` steps, and of half as many after each of so many halvings."""

    name = "progressive"

    def __init__(self, teacher: Teacher, samples: Samples, prediction: str, start: int, halvings: int) -> None:
        samples.check(teacher.conditions)
        self.first_teacher, self.samples, self.prediction = teacher, samples, prediction
        self.counts, self.stages = [start >> stage for stage in range(halvings + 1)], halvings + 1
        self.timesteps = [nested_timesteps(teacher.start(prediction), count) for count in (2 * start, *self.counts)]

    def identity(self) -> dict[str, Any]:
        return self.first_teacher.identity() | {"start": self.counts[0], "data": self.samples.digest()}

    def file(self, stage: int) -> str:
        return f"student-{self.counts[stage]}.safetensors"

    def facts(self, stage: int) -> Facts:
        teacher = self.first_teacher
        return Facts(
            self.name,
            tuple(teacher.shape),
            {self.counts[stage]: self.timesteps[stage + 1]},
            guidance=teacher.guidance,
            clip=teacher.clip,
            teacher=teacher.digest,
            settings={"start": self.counts[0]},
        )

    def begin(self, stage: int, student: Student, out: Path, processes: Processes, progress: bool) -> None:
        first = self.first_teacher
        self._halve(stage, first if stage == 0 else first.followed_by(student))

    def _halve(self, stage: int, teacher: Teacher) -> None:
        """Makes ready for a stage with this teacher."""
        first, self.teacher = self.first_teacher, teacher
        self.table = DDIM(
            first.schedule, timesteps=self.timesteps[stage], prediction=self.teacher.prediction, clip=first.clip
        ).table
        alpha, sigma = noise_levels(first.schedule, np.array(self.timesteps[stage + 1]))
        # By the student's rows: levels, what of x_t and of x_r the target is, the weight, and what of x_t and of the
        # student's output its x0 is; all in float64 here.
        ratio = sigma[1:] / sigma[:-1]
        share = 1 / (alpha[1:] - ratio * alpha[:-1])
        weight = np.maximum((alpha[:-1] / np.maximum(sigma[:-1], 1e-12)) ** 2, 1)
        p, q = x0_coefficients(self.prediction, alpha[:-1], sigma[:-1])
        columns = np.broadcast_arrays(alpha[:-1], sigma[:-1], share, -ratio * share, weight, p, q)
        self.of_rows = torch.from_numpy(np.stack(columns)).float()

    def losses(self, student: Any, stage: int, batch: Batch) -> Iterator[Tensor]:
        examples, row = batch.integers(self.samples.count), batch.integers(self.counts[stage])
        x0 = self.samples.at(examples).to(batch.device)
        alpha, sigma, of_r, of_t, weight, p, q = (per_sample(v, x0) for v in self.of_rows.to(batch.device)[:, row])
        xt = alpha * x0 + sigma * batch.normals(tuple(x0.shape[1:]))
        told, xr = self._told(batch), xt
        for half in (0, 1):
            xr = self.teacher.step(xr, self.table, 2 * row + half, examples, told=told)
        target = of_r * xr + of_t * xt
        t = torch.tensor(self.timesteps[stage + 1], device=batch.device)[row]
        x0_of_student = p * xt + q * student(xt, t, **self.teacher.told(examples), **told).float()
        yield self._loss(x0_of_student - target, weight, told)

    def _loss(self, difference: Tensor, weight: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        """The loss of a difference in x0, with the weight of its noise."""
        return (weight * difference.square()).mean()

    def _told(self, batch: Batch) -> dict[str, Tensor]:
        """What teacher and student are told beside the conditions."""
        return {}
