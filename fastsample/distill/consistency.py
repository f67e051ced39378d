"""Consistency distillation and training (Song et al. 2023; Geng et al. 2024, "Consistency models made easy").

f(x_t, t) is to be the end of the path of the diffusion ODE through x_t, from wherever on it. At the end it is: f of a
clean sample is that sample, by the scalings of distill.ConsistencyStudent. So it is enough that f agrees at neighbours:

    loss = mean w d(f(x_t, t), f'(x_r, r)),  d = sqrt(|a - b|^2 + c^2) - c,  c = 0.00054 sqrt(numbers of a sample)

or the mean of sqrt((a - b)^2 + 0.001^2) - 0.001 over the numbers, which leaves less noise where most of them are alike,
with x_t = alpha_t x0 + sigma_t z of a sample x0, f' the student itself or an average of it, without gradients, and x_r
one step nearer to clean data: of the teacher from x_t (distillation), or alpha_r x0 + sigma_r z (training).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from fastsample.broadcast import per_sample
from fastsample.checks import integer, one_of
from fastsample.distill.common import Common, run
from fastsample.distill.consistency_student import ConsistencyStudent
from fastsample.distill.data import Data, Samples
from fastsample.distill.method import Batch, Method
from fastsample.distill.pairs import CURRICULA, Pairs, levels_between
from fastsample.distill.settings import Settings
from fastsample.distill.student import Facts, Student
from fastsample.distill.target import Target, bounded, huber
from fastsample.distill.teacher import Teacher
from fastsample.model import Model
from fastsample.samplers.ddim import DDIM
from fastsample.samplers.heun import Heun
from fastsample.train.checkpoint import State
from fastsample.train.processes import Processes

DEFAULTS = Settings(iterations=4000)
MOST_SIGMA = 80.0  # next to which samples of unit size are noise: the paper's first level
SOLVERS = ("heun", "ddim")
LOSSES = ("norm", "huber")


def consistency(
    teacher: Model | None,
    data: Data,
    out: str | Path,
    *,
    curriculum: str = "fixed",
    solver: str = "heun",
    scales: int = 40,
    loss: str = "norm",
    target_decay: float = 0.0,
    **common: Unpack[Common],
) -> ConsistencyStudent:
    """Makes a consistency model: of a teacher by distillation, or without one by training.

    Args:
        teacher: any model that samplers take, `model(x, t, **keywords)`; None trains `student` alone.
        data: samples (N, ...), floating point as the teacher sees them, or images as fastsample.train takes them, whose
            labels become cond={"y": labels}. With tensors, `cond` has an entry for each sample.
        out: the folder of the run: student.safetensors, checkpoint.pt, loss.csv, loss.png.
        curriculum: which t and r meet. "fixed": neighbours among `scales` levels, with a teacher. "adaptive": among
            ever more levels, from 2 to `scales`, without one. "easy": t log-normal, r from clean data towards t, in
            eight stages; it begins as the teacher and needs no further call of it.
        solver: of the teacher's step: "heun", two calls, or "ddim", one.
        scales: noise levels, with (sigma / alpha)^(1/7) evenly spaced, moved to whole timesteps.
        loss: the distance d: "norm", of whole samples, or "huber", of each of their numbers.
        target_decay: of the average f'; 0 takes the student itself. 0.95 is the paper's.
        **common: see distill.Common.

    Returns:
        The student: `sample` draws in 1, 2 or 4 steps. fastsample.consistency takes it as its model, with
        sigmas=student.sigmas[timesteps] and sigma_data=1.

    Raises:
        ValueError, TypeError: arguments that cannot work, or a folder of another run, before anything is computed.
        ArithmeticError: the loss, its gradient or a weight is not finite; the last checkpoint is from before that.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from fastsample import Schedule, zoo
        >>> teacher = zoo.UNet(zoo.UNetConfig(widths=(8, 16)), Schedule.cosine(100)).eval()
        >>> short = {"settings": Settings(iterations=1, batch_size=2), "progress": False}
        >>> with TemporaryDirectory() as out:
        ...     student = consistency(teacher, torch.zeros(5, 1, 28, 28), out, **short)
        >>> student.sample((3, 1, 28, 28), steps=1, seed=0).shape
        torch.Size([3, 1, 28, 28])
    """
    one_of("curriculum", curriculum, tuple(CURRICULA))
    one_of("solver", solver, SOLVERS)
    one_of("loss", loss, LOSSES)
    Target(target_decay)
    if curriculum == "fixed" and teacher is None:
        raise ValueError(
            "curriculum='fixed' is distillation and needs a teacher: take 'adaptive' or 'easy' without one"
        )
    if curriculum == "adaptive" and teacher is not None:
        raise ValueError("curriculum='adaptive' is training from data: leave the teacher out and give it as student=")
    model = common.get("student") if teacher is None else teacher
    if model is None:
        raise ValueError("give a teacher, or a student= to be trained without one")
    if common.get("guidance", 1.0) != 1 and curriculum != "fixed":
        raise ValueError(f"guidance is the teacher's, which curriculum={curriculum!r} does not call")
    samples = Samples(data, common)

    def make(model: Teacher, student: Student, settings: Settings) -> ConsistencyMethod:
        assert isinstance(student, ConsistencyStudent)
        return ConsistencyMethod(
            model, samples, student, settings.iterations, curriculum, solver, scales, loss, target_decay
        )

    made = run(model, samples.shape, out, make, DEFAULTS, ConsistencyStudent, **samples.common)
    assert isinstance(made, ConsistencyStudent)
    return made


class ConsistencyMethod(Method):
    """The method, for a student whose class knows its scalings."""

    name = "consistency"

    def __init__(
        self,
        teacher: Teacher,
        samples: Samples,
        student: ConsistencyStudent,
        iterations: int,
        curriculum: str,
        solver: str,
        scales: int,
        loss: str,
        target_decay: float,
    ) -> None:
        samples.check(teacher.conditions)
        self.teacher, self.samples, self.student = teacher, samples, student
        self.curriculum, self.solver, self.loss = curriculum, solver, loss
        start = min(
            teacher.start(student.prediction), int(np.searchsorted(student.sigmas, MOST_SIGMA, side="right")) - 1
        )
        self.scales = integer("scales", scales, 2, start + 1)
        self.pairs: Pairs = CURRICULA[curriculum](student.sigmas[: start + 1], scales, iterations)
        self.timesteps = {n: levels_between(student.sigmas[: start + 1], n, scales) for n in (1, 2, 4) if n <= scales}
        if curriculum == "fixed":
            make = Heun if solver == "heun" else DDIM
            grid = levels_between(student.sigmas[: start + 1], scales, scales)
            self.table = make(teacher.schedule, timesteps=grid, prediction=teacher.prediction, clip=teacher.clip).table
        self.target = Target(target_decay)
        self._c = 0.00054 * math.sqrt(math.prod(samples.shape))

    def identity(self) -> dict[str, Any]:
        own = {"curriculum": self.curriculum, "solver": self.solver, "scales": self.scales, "loss": self.loss}
        own |= {"target_decay": self.target.decay, "data": self.samples.digest()}
        return self.teacher.identity() | own

    def facts(self, stage: int) -> Facts:
        teacher = self.teacher
        return Facts(
            self.name,
            tuple(teacher.shape),
            self.timesteps,
            guidance=teacher.guidance,
            clip=teacher.clip,
            teacher=teacher.digest,
            sampler="consistency",
            settings={
                "curriculum": self.curriculum,
                "scales": self.scales,
                "loss": self.loss,
                "target_decay": self.target.decay,
            },
        )

    def losses(self, student: Any, stage: int, batch: Batch) -> Iterator[Tensor]:
        examples = batch.integers(self.samples.count)
        x0, (t, r, row) = self.samples.at(examples).to(batch.device), self.pairs.draw(batch)
        noise = batch.normals(tuple(x0.shape[1:]))
        xt = self._noisy(x0, noise, t)
        xr = self._noisy(x0, noise, r) if row is None else self._stepped(xt, row, examples)
        told = self.teacher.told(examples)
        mine = self._clean(student, xt, t, told)
        with torch.no_grad():
            target = self._clean(self.target.of(student), xr, r, told)
        weight = self.pairs.weight(t, r).to(batch.device)
        yield (weight * self._distance(mine - bounded(target, mine, self.teacher.clip))).mean()

    def _distance(self, difference: Tensor) -> Tensor:
        squares = difference.square().flatten(1)
        if self.loss == "huber":
            return huber(squares).mean(1)
        return (squares.sum(1) + self._c**2).sqrt() - self._c

    def _clean(self, model: Any, x: Tensor, t: Tensor, told: Mapping[str, Any]) -> Tensor:
        output = model(x, self.student.time_of(t.clamp(min=0)), **told).float()
        return self.student.clean(output, x, t)

    def _noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.student.levels(t, x0)
        return alpha * x0 + sigma * noise

    def _stepped(self, x: Tensor, row: Tensor, examples: Tensor) -> Tensor:
        """One step of the teacher; Heun's second row is missing after the last level, which is Euler's."""
        if self.solver == "ddim":
            return self.teacher.step(x, self.table, row, examples)
        h1 = torch.empty_like(x)
        half = self.teacher.step(x, self.table, 2 * row, examples, x0=h1)
        second = (2 * row + 1).clamp(max=len(self.table) - 1)
        whole = self.teacher.step(half, self.table, second, examples, history=[h1])
        return torch.where(per_sample(2 * row + 1 < len(self.table), x), whole, half)

    def begin(self, stage: int, student: Student, out: Path, processes: Processes, progress: bool) -> None:
        self.target.begin(student)

    def moved(self, student: Student) -> None:
        self.target.follow(student)

    def state(self) -> State:
        return self.target.state()

    def take(self, state: State) -> None:
        self.target.take(state)
