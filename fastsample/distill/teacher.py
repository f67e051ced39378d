"""The model that is distilled: its steps are rows of a table, guided where that is asked."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsample.checks import checked_shape, one_of, real
from fastsample.distill.conditions import Conditions
from fastsample.distill.student import Student
from fastsample.loop.guidance import guidance_of
from fastsample.loop.options import RunOptions
from fastsample.model import Model, Predictor, prediction_of, schedule_of
from fastsample.ops.step import step
from fastsample.samplers.limits import limit_columns
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Schedule
from fastsample.storage.digests import digest_of
from fastsample.tables import Table
from fastsample.times.automatic import MOST_RATIO
from fastsample.train.losses import PREDICTIONS
from fastsample.zoo.plain import plain
from fastsample.zoo.unet import UNet

MOST_CLIPPED_RATIO = 64.0


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

    Attributes:
        digest: a hash of the model's weights, to tell teachers apart; None for a function.

    Raises:
        ValueError, TypeError: a shape, prediction, clip or guidance that cannot be; guidance without uncond; a model
            whose dropout or batch norm is in training mode.
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
        if isinstance(model, nn.Module):
            _refuse_training(model)
        self.predictor = Predictor(model)
        self.shape = checked_shape("shape", (1, *shape))[1:]
        if not self.shape:
            raise ValueError("shape must be that of one sample, such as (3, 32, 32), got ()")
        self.schedule = schedule_of(model, schedule)
        self.prediction = one_of("prediction", prediction_of(model, prediction), PREDICTIONS)
        self.conditions = Conditions(cond, uncond)
        if isinstance(model, UNet):
            _check_labels(self.conditions, model.config.num_classes)
        self.guidance = real("guidance", guidance)
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {guidance}")
        if self.guidance != 1 and uncond is None:
            raise ValueError("guidance needs uncond=: the model's keywords for the unconditional half")
        self.clip = None if clip is None else real("clip", clip)
        limit_columns(self.clip)
        self.device = device or self.predictor.device or torch.device("cpu")
        self.digest = digest_of(model) if isinstance(model, nn.Module) else None

    @property
    def model(self) -> Model:
        """The model that is called."""
        return self.predictor.model

    def start(self, prediction: str) -> int:
        """The noisiest timestep that a student of this prediction can start at.

        An error in epsilon is sigma / alpha times as large in x0: 14.6 at the end of Stable Diffusion's schedule, 2e4
        at that of a cosine. A teacher of epsilon is used up to 16, or 64 where its x0 is clipped and the student
        returns v.
        """
        most = MOST_CLIPPED_RATIO if self.clip is not None and prediction != "epsilon" else MOST_RATIO
        alpha_bar = self.schedule.alphas_cumprod
        sound = (1 - alpha_bar <= most**2 * alpha_bar) | ("epsilon" not in (self.prediction, prediction))
        return int(np.flatnonzero(sound)[-1])

    def probe(self) -> None:
        """Calls the model for one sample, guided where that is asked.

        Raises:
            ValueError, TypeError: the conditions do not suit guidance, or the model returns something else than the
                sample's shape or twice its channels.
        """
        x, index = torch.zeros(1, *self.shape, device=self.device), torch.zeros(1, dtype=torch.int64)
        table = Table([self.schedule.T // 2], p=0.0, q=1.0, b=1.0)
        try:
            self.step(x, table, torch.zeros(1, dtype=torch.int64), index)
        except ValueError as error:
            raise ValueError(f"the teacher cannot be used for samples of shape {tuple(self.shape)}: {error}") from error

    def options(self, index: Tensor, weights: Tensor | None = None) -> dict[str, Any]:
        """The options of a sampler for these examples of the conditions; weights of guidance in place of the one."""
        cond, uncond = self.conditions.at(index, self.device)
        guidance = self.guidance if weights is None else weights
        if isinstance(guidance, float) and guidance == 1:
            return {"cond": cond}
        return {"cond": cond, "uncond": uncond, "guidance": guidance}

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
        weights: Tensor | None = None,
        told: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """One row of a table of the teacher's for each sample.

        Args:
            x: states, (B, ...) float32.
            table: rows for the teacher's prediction that add no noise.
            row: of each sample, int64 (B,).
            index: each sample's example of the conditions, int64 (B,).
            history, x0: of a row that reads earlier x0, and what receives this row's.
            weights: of guidance, in place of the teacher's own, one per sample.
            told: what a teacher that is a student is told beside the conditions, without guidance of its own.
        """
        options = self.options(index, weights)
        if told:
            options["cond"] = {**options["cond"], **told}
        guided = guidance_of(x, RunOptions(**options), self.predictor.known_dtype)
        t = torch.tensor(table.t)[row.cpu()].to(x.device)
        given = x.to(self.predictor.dtype, copy=True)
        if guided.weights is None:
            m = self.predictor(given, t, guided.conditional)
        else:
            m = self.predictor(torch.cat((given, given)), torch.cat((t, t)), guided.both)
        return step(x, m, table, row.cpu(), guidance=guided.weights, history=history, x0_out=x0)

    @torch.no_grad()
    def path(self, sampler: Sampler, x: Tensor, index: Tensor, every: int, weights: Tensor | None = None) -> Tensor:
        """The states after every so many rows of a sampler from x on, (rows / every, B, ...)."""
        states = [
            s.x.clone()
            for s in sampler.iterate(self.model, x, **self.options(index, weights))
            if (s.index + 1) % every == 0
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
            "teacher": self.digest,
            "shape": tuple(self.shape),
            "schedule": hashlib.sha256(self.schedule.alphas_cumprod.tobytes()).hexdigest(),
            "teacher_prediction": self.prediction,
            "conditions": self.conditions.digest(),
            "guidance": self.guidance,
            "clip": self.clip,
        }


def _check_labels(conditions: Conditions, num_classes: int) -> None:
    """Raises ValueError where a label is of no class of the model; num_classes stands for none."""
    for name, keywords in (("cond", conditions.cond), ("uncond", conditions.uncond or {})):
        y = keywords.get("y")
        if isinstance(y, Tensor) and y.numel() and not 0 <= int(y.min()) <= int(y.max()) <= num_classes:
            raise ValueError(f"{name}['y'] must lie in 0 .. {num_classes}, the model's classes; got {int(y.max())}")


def _refuse_training(model: nn.Module) -> None:
    """Raises ValueError where a layer would make every call another."""
    for module in model.modules():
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if module.training and (drops or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            raise ValueError(f"the teacher has a {type(module).__name__} in training mode: call .eval() on it first")
