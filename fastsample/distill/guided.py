"""Distillation of guided models (Meng et al. 2023): one student for all weights of guidance, in fewer and fewer steps.

A first stage folds guidance in. At any timestep t, from x_t = alpha x0 + sigma z of a sample and for any weight w,

    loss = mean max(1, alpha_t^2 / sigma_t^2) (x0 of the student, told w - x0 of the guided teacher with w)^2 / s^2

so that one call does what two did. s = 1 + w - least, and w is evenly drawn in log s, unlike the paper's even w and
s = 1: what guidance adds grows with w, and the errors of the largest weights would leave little learning to the small
ones. The stages after it halve the number of steps as in distill/progressive.py, with the same s: the student before,
told the same w, is the teacher, without guidance of its own. Data may be pixels or latents.
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
from fastsample.distill.common import Common, run
from fastsample.distill.data import Data, Samples
from fastsample.distill.guidance_range import Range, spread, take_range
from fastsample.distill.method import Batch
from fastsample.distill.progressive import Progressive, halvings_of
from fastsample.distill.settings import Settings
from fastsample.distill.student import Facts, Student
from fastsample.distill.teacher import Teacher
from fastsample.model import Model
from fastsample.samplers.ddim import DDIM
from fastsample.times.levels import noise_levels
from fastsample.times.predictions import x0_coefficients
from fastsample.train.processes import Processes

DEFAULTS = Settings(iterations=1000)
_TOLD = ("guidance",)


def guided(
    teacher: Model,
    data: Data,
    out: str | Path,
    *,
    start: int = 16,
    steps: int = 1,
    **common: Unpack[Common],
) -> Student:
    """Distils a guided model to one student of all weights in a range, and that to fewer and fewer steps.

    Args:
        teacher: any model that samplers take, `model(x, t, **keywords)`; it may be one of latents.
        data: samples (N, ...), floating point as the teacher sees them, or images as fastsample.train takes them, whose
            labels become cond={"y": labels}. With tensors, `cond` has an entry for each sample.
        out: the folder of the run: student-guided.safetensors of the first stage, student-16.safetensors and so on, one
            per halving, checkpoint.pt, loss.csv, loss.png.
        start: the steps of the first halving's student, a power of two times `steps`; its teacher takes twice as many.
        steps: those of the last one.
        **common: see distill.Common. guidance=(least, most) is needed; the student's network is told the weight.

    Returns:
        The student of the last stage, whose `sample` takes `guidance` and, for samples by the paper's second sampler,
        `stochastic`; distill.load has those of all stages from their files.

    Raises:
        ValueError, TypeError: arguments that cannot work, or a folder of another run, before anything is computed.
        ArithmeticError: the loss, its gradient or a weight is not finite; the last checkpoint is from before that.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from fastsample import Schedule, zoo
        >>> from fastsample.train import ImageData
        >>> teacher = zoo.UNet(zoo.UNetConfig(widths=(8, 16)), Schedule.cosine(100)).eval()
        >>> digits = ImageData(torch.zeros(5, 1, 28, 28, dtype=torch.uint8), torch.arange(5))
        >>> short = {"settings": Settings(iterations=1, batch_size=2), "progress": False}
        >>> none = {"y": torch.tensor([10])}
        >>> with TemporaryDirectory() as out:
        ...     student = guided(teacher, digits, out, start=2, uncond=none, guidance=(1.0, 4.0), **short)
        >>> student.sample((3, 1, 28, 28), seed=0, guidance=2.5, y=torch.arange(3)).shape
        torch.Size([3, 1, 28, 28])
    """
    weights = take_range(common)
    if weights is None:
        raise ValueError("guidance must be (least, most), the weights that the student is for")
    samples = Samples(data, common)
    halvings = halvings_of(start, steps)

    def make(model: Teacher, student: Student, settings: Settings) -> Guided:
        return Guided(model, samples, student.prediction, int(start), halvings, weights)

    return run(teacher, samples.shape, out, make, DEFAULTS, told=_TOLD, **samples.common)


class Guided(Progressive):
    """The method: a stage that folds guidance in, and then those of halving."""

    name = "guided"

    def __init__(
        self, teacher: Teacher, samples: Samples, prediction: str, start: int, halvings: int, weights: Range
    ) -> None:
        super().__init__(teacher, samples, prediction, start, halvings)
        self.weights = weights
        self.stages += 1
        every = np.arange(teacher.start(prediction), -1, -1)
        self.any_table = DDIM(
            teacher.schedule, timesteps=every.tolist(), prediction=teacher.prediction, clip=teacher.clip
        ).table
        alpha, sigma = (level[:-1] for level in noise_levels(teacher.schedule, every))
        weight = np.maximum((alpha / np.maximum(sigma, 1e-12)) ** 2, 1)
        p, q = x0_coefficients(prediction, alpha, sigma)
        columns = np.broadcast_arrays(alpha, sigma, weight, p, q)
        self.of_any_row = torch.from_numpy(np.stack(columns)).float()

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"weights": self.weights}

    def file(self, stage: int) -> str:
        return super().file(stage - 1) if stage else "student-guided.safetensors"

    def facts(self, stage: int) -> Facts:
        teacher = self.first_teacher
        count = self.counts[stage - 1] if stage else 2 * self.counts[0]
        return Facts(
            self.name,
            tuple(teacher.shape),
            {count: self.timesteps[stage]},
            guidance=self.weights,
            clip=teacher.clip,
            teacher=teacher.digest,
            told=_TOLD,
            settings={"start": self.counts[0]},
        )

    def begin(self, stage: int, student: Student, out: Path, processes: Processes, progress: bool) -> None:
        if stage:
            self._halve(stage - 1, self.first_teacher.followed_by(student))

    def losses(self, student: Any, stage: int, batch: Batch) -> Iterator[Tensor]:
        if stage:
            yield from super().losses(student, stage - 1, batch)
            return
        teacher, examples = self.first_teacher, batch.integers(self.samples.count)
        row = batch.integers(len(self.any_table))
        x0 = self.samples.at(examples).to(batch.device)
        alpha, sigma, weight, p, q = (per_sample(v, x0) for v in self.of_any_row.to(batch.device)[:, row])
        xt = alpha * x0 + sigma * batch.normals(tuple(x0.shape[1:]))
        told, target = self._told(batch), torch.empty_like(xt)
        teacher.step(xt, self.any_table, row, examples, x0=target, weights=told["guidance"])
        t = torch.tensor(self.any_table.t, device=batch.device)[row]
        x0_of_student = p * xt + q * student(xt, t, **teacher.told(examples), **told).float()
        yield self._loss(x0_of_student - target, weight, told)

    def _loss(self, difference: Tensor, weight: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        scale = 1 + told["guidance"] - self.weights[0]
        return super()._loss(difference / per_sample(scale, difference), weight, told)

    def _told(self, batch: Batch) -> dict[str, Tensor]:
        return {"guidance": spread(batch.shares(), self.weights)}
