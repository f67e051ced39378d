"""The model that is distilled: its steps are rows of a table, guided where that is asked."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsample.checks import checked_shape, one_of, real
from fastsample.distill.conditions import Conditions
from fastsample.distill.digests import digest_of
from fastsample.distill.student import Student
from fastsample.loop.guidance import guidance_of
from fastsample.loop.options import RunOptions
from fastsample.model import Model, Predictor, prediction_of, schedule_of
from fastsample.ops.step import step
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Schedule
from fastsample.tables import Table
from fastsample.times.automatic import MOST_RATIO
from fastsample.train.losses import PREDICTIONS
from fastsample.zoo.unet import UNet


class Teacher:
    """A model with all that its steps need. It is never changed, and called without gradients.

    Args:
        model: `model(x, t, **keywords)`, as samplers take it.
        shape: of one sample, without the batch.
        schedule, prediction: the model's; None as for fastsample.ddim.
        cond, uncond: see distill.Conditions.
        guidance: w; 1 evaluates the conditional half alone.
        clip: what x0 is clipped to in the teacher's steps; None for data without bounds, such as latents.
        device: where to compute; None is where the model is, or the CPU for a function.

    Raises:
        ValueError, TypeError: a shape, prediction or guidance that cannot be; guidance without uncond.
    """

    def __init__(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        schedule: Schedule | None = None,
        prediction: str | None = None,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        guidance: float = 1.0,
        clip: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        if isinstance(model, UNet) and prediction is None:
            model = plain(model)
        self.predictor = Predictor(model)
        self.shape = checked_shape("shape", (1, *shape))[1:]
        if not self.shape:
            raise ValueError("shape must be that of one sample, such as (3, 32, 32), got ()")
        self.schedule = schedule_of(model, schedule)
        self.prediction = one_of("prediction", prediction_of(model, prediction), PREDICTIONS)
        self.conditions = Conditions(cond, uncond)
        self.guidance = real("guidance", guidance)
        if self.guidance != 1 and uncond is None:
            raise ValueError("guidance needs uncond=: the model's keywords for the unconditional half")
        self.clip = clip
        self.device = device or self.predictor.device or torch.device("cpu")

    @property
    def model(self) -> Model:
        """As given."""
        return self.predictor.model

    def holds_at_pure_noise(self) -> bool:
        """Whether its x0 can be used at the schedule's last timestep.

        An error in epsilon is sigma / alpha times as large in x0: 14.6 on Stable Diffusion's schedule, 2e4 on a cosine.
        """
        alpha_bar = self.schedule.alphas_cumprod[-1]
        return self.prediction != "epsilon" or bool(1 - alpha_bar <= MOST_RATIO**2 * alpha_bar)

    def start(self) -> int:
        """The noisiest timestep where its x0 can be used."""
        alpha_bar = self.schedule.alphas_cumprod
        last = self.schedule.T - 1
        if self.holds_at_pure_noise():
            return last
        return int(np.flatnonzero(1 - alpha_bar <= MOST_RATIO**2 * alpha_bar)[-1])

    def options(self, index: Tensor) -> dict[str, Any]:
        """The options of a sampler for these examples of the conditions."""
        cond, uncond = self.conditions.at(index, self.device)
        return {"cond": cond} if self.guidance == 1 else {"cond": cond, "uncond": uncond, "guidance": self.guidance}

    def told(self, index: Tensor) -> Mapping[str, Any]:
        """The keywords of a student for these examples, floating-point ones in float32."""
        cond, _ = self.conditions.at(index, self.device)
        return guidance_of(index, RunOptions(cond=cond), torch.float32).conditional

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        table: Table,
        row: Tensor,
        index: Tensor,
        history: Sequence[Tensor] = (),
        x0: Tensor | None = None,
    ) -> Tensor:
        """One row of a table of the teacher's for each sample.

        Args:
            x: states, (B, ...) float32.
            table: rows for the teacher's prediction that add no noise.
            row: of each sample, int64 (B,).
            index: each sample's example of the conditions, int64 (B,).
            history, x0: of a row that reads earlier x0, and what receives this row's.
        """
        guided = guidance_of(x, RunOptions(**self.options(index)), self.predictor.known_dtype)
        t = torch.tensor(table.t)[row.cpu()].to(x.device)
        given = x.to(self.predictor.dtype, copy=True)
        if guided.weights is None:
            m = self.predictor(given, t, guided.conditional)
        else:
            m = self.predictor(torch.cat((given, given)), torch.cat((t, t)), guided.both)
        return step(x, m, table, row.cpu(), guidance=guided.weights, history=history, x0_out=x0)

    @torch.no_grad()
    def path(self, sampler: Sampler, x: Tensor, index: Tensor, every: int) -> Tensor:
        """The states after every so many rows of a sampler from x on, (rows / every, B, ...)."""
        states = [
            s.x.clone() for s in sampler.iterate(self.model, x, **self.options(index)) if (s.index + 1) % every == 0
        ]
        return torch.stack(states)

    def followed_by(self, student: Student) -> Teacher:
        """A teacher that is a copy of a student of this one; what guidance this one has, the student has learned."""
        model = copy.deepcopy(student).requires_grad_(False).eval()
        return Teacher(
            model,
            self.shape,
            schedule=self.schedule,
            prediction=student.prediction,
            cond=self.conditions.cond,
            clip=self.clip,
            device=self.device,
        )

    def identity(self) -> dict[str, Any]:
        """All of it that decides the outcome of a run."""
        return {
            "teacher": self.digest(),
            "shape": tuple(self.shape),
            "schedule": hashlib.sha256(self.schedule.alphas_cumprod.tobytes()).hexdigest(),
            "teacher_prediction": self.prediction,
            "conditions": self.conditions.digest(),
            "guidance": self.guidance,
            "clip": self.clip,
        }

    def digest(self) -> str | None:
        """A hash of the model's weights, to tell teachers apart; None for a function."""
        return digest_of(self.model) if isinstance(self.model, nn.Module) else None


def plain(model: UNet) -> UNet:
    """The same network without a variance, returning v, where it gives v or x0; else the model itself.

    Turned into epsilon and used for x0 next to pure noise, the rounding of its output alone is multiplied by thousands.
    """
    config = model.config
    given = config.target or config.prediction
    if given == "epsilon":
        return model
    network = UNet(replace(config, prediction="v", target=given, learned_variance=False), model.schedule)
    weights, rows = model.state_dict(), config.channels * config.fold**2
    network.load_state_dict(weights | {name: weights[name][:rows] for name in ("leave.weight", "leave.bias")})
    return network.to(model.enter.weight.device, model.enter.weight.dtype).requires_grad_(False).eval()
