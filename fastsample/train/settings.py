"""What decides the outcome of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastsample.checks import one_of
from fastsample.schedule import Schedule
from fastsample.train.losses import LOSSES, PREDICTIONS, variance_of
from fastsample.train.timesteps import TIMESTEP_SAMPLERS

SCHEDULES = ("linear", "scaled_linear", "cosine")


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of a run; the defaults made the bundled digits model.

    Args:
        steps: optimizer steps. A run can be extended: all steps up to the cooldown are the same for any number.
        batch_size: images per step, of each process.
        lr: peak learning rate, reached after `warmup` steps and kept until the cooldown.
        cooldown: share of the steps, the last ones, in which the learning rate falls to 0 as 1 - sqrt (Hagele et al.
            2024, "Scaling laws and compute-optimal training beyond fixed training durations").
        weight_decay: of AdamW.
        ema_decay: of the averaged weights, which are the ones kept.
        label_dropout: how often a label is replaced by "none", for classifier-free guidance.
        timesteps, schedule: T, and "cosine", "linear" or "scaled_linear", whose betas are scaled by 1000 / T as
            improved-diffusion's.
        loss, prediction, variance: see train.DiffusionLoss.
        target: what the network gives and the error is taken of, turned into the prediction (zoo.UNetConfig). None is
            v for a model that returns epsilon, else the prediction.
        timestep_sampler: "uniform" or "importance", see train.ImportanceTimesteps.
        widths: see zoo.UNetConfig; None follows the size of the images.
        seed: of the first weights and of every batch.

    Raises:
        ValueError: a value out of its range.
    """

    steps: int = 17000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 500
    cooldown: float = 0.3
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    timesteps: int = 1000
    schedule: str = "cosine"
    loss: str = "hybrid"
    prediction: str = "epsilon"
    variance: str | None = None
    target: str | None = None
    timestep_sampler: str = "uniform"
    widths: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.widths is not None:
            object.__setattr__(self, "widths", tuple(self.widths))
        if self.target is None:
            object.__setattr__(self, "target", "v" if self.prediction == "epsilon" else self.prediction)
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= 1 << 64:
            raise ValueError(f"seed must be below 2^64, got {self.seed}")
        for name in ("lr", "weight_decay"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        for name in ("label_dropout", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.timesteps < 2:
            raise ValueError(f"timesteps must be at least 2, got {self.timesteps}")
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("loss", self.loss, LOSSES)
        one_of("prediction", self.prediction, PREDICTIONS)
        one_of("timestep_sampler", self.timestep_sampler, tuple(TIMESTEP_SAMPLERS))
        one_of("target", self.target, PREDICTIONS)
        variance_of(self.loss, self.variance)
        self.forward_process()

    def forward_process(self) -> Schedule:
        """The schedule that the names mean.

        Raises:
            ValueError: its betas would pass 1, as those of "linear" do with 20 timesteps or fewer.
        """
        T, scale = self.timesteps, 1000 / self.timesteps
        if self.schedule == "cosine":
            return Schedule.cosine(T)
        first, last = (1e-4, 0.02) if self.schedule == "linear" else (0.00085, 0.012)
        if last * scale >= 1:
            raise ValueError(f"timesteps must be more than {last * 1000:g} for a {self.schedule} schedule, got {T}")
        return getattr(Schedule, self.schedule)(T, first * scale, last * scale)

    def cooldown_start(self) -> int:
        """The first step whose learning rate depends on `steps`."""
        return self.steps - round(self.cooldown * self.steps)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = min((step + 1) / max(self.warmup, 1), 1.0)
        start = self.cooldown_start()
        fall = 1.0 if step < start else 1 - math.sqrt((step - start + 1) / (self.steps - start + 1))
        return self.lr * rise * fall
