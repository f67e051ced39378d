"""Latent consistency distillation (Luo et al. 2023).

f(x_t, t) = c_skip x_t + c_out x0 is to be the end of the guided teacher's path through x_t. The teacher goes from one
of few timesteps to the next in one DDIM step, which skips k = T / scales timesteps of its schedule, and f is to agree:

    x_t = alpha x0 + sigma z of a sample,  x_r the teacher's DDIM step from it with guidance w
    loss = mean ( sqrt((f(x_t, t, w) - f'(x_r, r, w))^2 + c^2) - c ),  c = 0.001, or the mean of the square

with f' the student itself or an average of it, without gradients. After the last timestep x_r is clean, and so f'.
Data may be pixels or latents. The student predicts what its teacher does, so that a LoRA can make the one of the
other (distill/lcm_lora.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastsample.checks import integer, one_of
from fastsample.distill.common import Common, run
from fastsample.distill.data import Data, Samples
from fastsample.distill.grid import nested_timesteps
from fastsample.distill.guidance_range import Range, spread, take_range
from fastsample.distill.lcm_student import LCMStudent
from fastsample.distill.method import Batch, Method
from fastsample.distill.settings import Settings
from fastsample.distill.student import Facts, Student
from fastsample.distill.target import Target, bounded, huber
from fastsample.distill.teacher import Teacher
from fastsample.model import Model
from fastsample.samplers.ddim import DDIM
from fastsample.train.checkpoint import State
from fastsample.train.processes import Processes

DEFAULTS = Settings(iterations=2000)
LOSSES = ("huber", "l2")
_STEPS = (8, 4, 2, 1)  # that a student is sampled in


def lcm(
    teacher: Model,
    data: Data,
    out: str | Path,
    *,
    scales: int = 50,
    loss: str = "huber",
    target_decay: float = 0.0,
    **common: Unpack[Common],
) -> LCMStudent:
    """Distils a guided model to a latent consistency model, which fastsample.lcm samples in a few steps.

    Args:
        teacher: any model that samplers take, `model(x, t, **keywords)`; it may be one of latents.
        data: samples (N, ...), floating point as the teacher sees them, or images as fastsample.train takes them, whose
            labels become cond={"y": labels}. With tensors, `cond` has an entry for each sample.
        out: the folder of the run: student.safetensors, checkpoint.pt, loss.csv, loss.png.
        scales: timesteps between which the teacher steps. Errors add up along them: fewer are learned in less time.
        loss: "huber" or "l2".
        target_decay: of the average f'; 0 takes the student itself, 0.95 is what the authors' code has.
        **common: see distill.Common. With guidance=(least, most) the student is told the weight.

    Returns:
        The student: `sample` draws in 8, 4, 2 or 1 steps, as many of these as there are scales.

    Raises:
        ValueError, TypeError: arguments that cannot work, or a folder of another run, before anything is computed.
        ArithmeticError: the loss, its gradient or a weight is not finite; the last checkpoint is from before that.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from fastsample import Schedule, zoo
        >>> teacher = zoo.UNet(zoo.UNetConfig(widths=(8, 16)), Schedule.cosine(100)).eval()
        >>> short = {"settings": Settings(iterations=1, batch_size=2), "progress": False}
        >>> with TemporaryDirectory() as out:
        ...     student = lcm(teacher, torch.zeros(5, 1, 28, 28), out, scales=4, **short)
        >>> student.steps(), student.sample((3, 1, 28, 28), steps=2, seed=0).shape
        ((4, 2, 1), torch.Size([3, 1, 28, 28]))
    """
    weights = take_range(common)
    return distilled("lcm", teacher, Samples(data, common), out, scales, loss, target_decay, weights)


def distilled(
    name: str,
    teacher: Model,
    samples: Samples,
    out: str | Path,
    scales: int,
    loss: str,
    target_decay: float,
    weights: Range | None,
) -> LCMStudent:
    """What the method makes under this name, with weights of guidance that the student is told; see lcm."""
    one_of("loss", loss, LOSSES)
    Target(target_decay)

    def make(model: Teacher, student: Student, settings: Settings) -> LCMMethod:
        assert isinstance(student, LCMStudent)
        return LCMMethod(name, model, samples, student, scales, loss, target_decay, weights)

    told = () if weights is None else ("guidance",)
    made = run(teacher, samples.shape, out, make, DEFAULTS, LCMStudent, told, both=False, **samples.common)
    assert isinstance(made, LCMStudent)
    return made


class LCMMethod(Method):
    """The method, under the name of its function.

    Args:
        name: of the function.
        teacher, samples, student: what it is of, on and for.
        scales: timesteps between which the teacher steps.
        loss, target_decay: see lcm.
        weights: (least, most) of guidance, which the student is told; None for the teacher's own.
    """

    def __init__(
        self,
        name: str,
        teacher: Teacher,
        samples: Samples,
        student: LCMStudent,
        scales: int,
        loss: str,
        target_decay: float,
        weights: Range | None,
    ) -> None:
        samples.check(teacher.conditions)
        self.name, self.teacher, self.samples, self.student = name, teacher, samples, student
        start = teacher.start(student.prediction)
        self.scales, self.loss, self.weights = integer("scales", scales, 1, start + 1), loss, weights
        grid = nested_timesteps(start, self.scales)
        self.times = torch.tensor((*grid, -1))
        self.timesteps = {n: tuple(grid[k * self.scales // n] for k in range(n)) for n in _STEPS if n <= self.scales}
        self.table = DDIM(teacher.schedule, timesteps=grid, prediction=teacher.prediction, clip=teacher.clip).table
        self.target = Target(target_decay)

    def identity(self) -> dict[str, Any]:
        own = {"scales": self.scales, "loss": self.loss, "target_decay": self.target.decay, "weights": self.weights}
        return self.teacher.identity() | {"data": self.samples.digest()} | own

    def facts(self, stage: int) -> Facts:
        teacher = self.teacher
        return Facts(
            self.name,
            tuple(teacher.shape),
            self.timesteps,
            guidance=self.weights or teacher.guidance,
            clip=teacher.clip,
            teacher=teacher.digest,
            sampler="lcm",
            told=() if self.weights is None else ("guidance",),
            settings={"scales": self.scales, "loss": self.loss, "target_decay": self.target.decay},
        )

    def losses(self, student: Any, stage: int, batch: Batch) -> Iterator[Tensor]:
        examples, row = batch.integers(self.samples.count), batch.integers(self.scales)
        x0, times = self.samples.at(examples).to(batch.device), self.times.to(batch.device)
        t, r = times[row], times[row + 1]
        alpha, sigma = self.student.levels(t, x0)
        xt = alpha * x0 + sigma * batch.normals(tuple(x0.shape[1:]))
        told, weights = dict(self.teacher.told(examples)), None
        if self.weights is not None:
            told["guidance"] = weights = spread(batch.shares(), self.weights)
        xr = self.teacher.step(xt, self.table, row, examples, weights=weights)
        mine = self._clean(student, xt, t, told)
        with torch.no_grad():
            target = self._clean(self.target.of(student), xr, r, told)
        yield self._distance(mine - bounded(target, mine, self.teacher.clip)).mean()

    def _clean(self, model: Any, x: Tensor, t: Tensor, told: dict[str, Any]) -> Tensor:
        return self.student.clean(model(x, t.clamp(min=0), **told).float(), x, t)

    def _distance(self, difference: Tensor) -> Tensor:
        squares = difference.square()
        return squares if self.loss == "l2" else huber(squares)

    def begin(self, stage: int, student: Student, out: Path, processes: Processes, progress: bool) -> None:
        self.target.begin(student)

    def moved(self, student: Student) -> None:
        self.target.follow(student)

    def state(self) -> State:
        return self.target.state()

    def take(self, state: State) -> None:
        self.target.take(state)
