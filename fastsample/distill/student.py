"""What distillation makes: a network of few steps that knows the sampler it was distilled for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastsample.checks import checked_shape, integer, one_of
from fastsample.distill.stochastic import Stochastic
from fastsample.model import unwrapped
from fastsample.ops.noise.keys import Index, Seed
from fastsample.samplers.ddim import DDIM
from fastsample.samplers.guidance_embedding import guidance_scale_embedding
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Schedule
from fastsample.times.predictions import Prediction
from fastsample.zoo.autoencoder import Autoencoder

# "both" are two halves [epsilon, x0], of which v = alpha epsilon - sigma x0 (Salimans & Ho 2022): so a model of epsilon
# and a variance becomes one that is exact next to pure noise, without a further weight.
Output = Literal["epsilon", "v", "x0", "both"]
OUTPUTS: tuple[Output, ...] = get_args(Output)


@dataclass(frozen=True)
class Facts:
    """How a student was made, and so how it is sampled; kept in its file.

    Args:
        method: the name of the distillation.
        shape: of one sample.
        timesteps: by number of steps, the timesteps that it was distilled for.
        guidance: the weight that is folded in, 1 is none; or (least, most), between which `sample` is told one.
        clip: what samples were limited to in the teacher's steps, if anything.
        teacher: a hash of the teacher's weights.
        sampler: "ddim", "consistency" for a distill.ConsistencyStudent or "lcm" for a distill.LCMStudent.
        told: which of "steps" and "guidance" the network is told, as keywords of a number per sample.
        settings: all else that decides the outcome.
    """

    method: str
    shape: tuple[int, ...]
    timesteps: Mapping[int, tuple[int, ...]]
    guidance: float | tuple[float, float] = 1.0
    clip: float | None = None
    teacher: str | None = None
    sampler: str = "ddim"
    told: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


class Student(nn.Module):
    """A distilled model: called as its teacher is, and sampled by `sample` in the steps it was distilled for.

    Args:
        network: called as network(x, t, **keywords).
        output: what the network gives: "epsilon", "v", "x0", or "both", the halves [epsilon, x0]. Further channels,
            such as a variance, are left out.
        schedule: the forward process.
        facts: how it was made.

    Attributes:
        prediction: what the student returns, as samplers name it; v where the network gives both halves.
        autoencoder: of a student of latents, see decode_with; no part of its weights.
    """

    autoencoder: Autoencoder | None = None

    def __init__(self, network: nn.Module, output: str, schedule: Schedule, facts: Facts) -> None:
        super().__init__()
        given = one_of("output", output, OUTPUTS)
        self.network, self.output, self.schedule, self.facts = network, given, schedule, facts
        self.prediction: Prediction = "v" if given == "both" else given
        abar = torch.tensor(schedule.alphas_cumprod)
        # No part of the weights: they follow from the schedule, and a change of dtype must not round them.
        self._levels = torch.stack((abar.sqrt(), (1 - abar).sqrt())).float()

    def decode_with(self, autoencoder: Autoencoder | None) -> None:
        """Makes images of what it samples from now on; None leaves samples as they are.

        Raises:
            ValueError: its latents are of another shape than this student's samples.
        """
        if autoencoder is not None and autoencoder.config.latent_shape != tuple(self.facts.shape):
            shape = autoencoder.config.latent_shape
            raise ValueError(f"autoencoder makes latents of shape {shape}, the model is for {tuple(self.facts.shape)}")
        self.__dict__["autoencoder"] = autoencoder  # as a submodule it would be trained and saved with the network

    def forward(self, x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        """The prediction for x (B, C, ...) at timesteps t (B,), of x's shape."""
        given = self.given(x, t, **keywords)
        channels = x.shape[1]
        if self.output != "both":
            prediction: Tensor = given[:, :channels]
            return prediction
        alpha, sigma = self.levels(t, x)
        return alpha * given[:, :channels] - sigma * given[:, channels : 2 * channels]

    def given(self, x: Tensor, t: Tensor, **keywords: Any) -> Any:
        """What the network itself gives."""
        dim = getattr(getattr(self.network, "config", None), "time_cond_proj_dim", None)
        if dim is not None and "guidance" in keywords:  # as diffusers' models are told it
            embedding = guidance_scale_embedding(keywords.pop("guidance"), dim)
            keywords["timestep_cond"] = embedding.to(x.device, x.dtype)
        return unwrapped(self.network(x, t, **keywords))

    def levels(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at whole timesteps (B,), in shapes that meet x; (1, 0) at t = -1, clean data."""
        self._levels = self._levels.to(x.device)
        known = self._levels[:, t.long().clamp(min=0)]
        clean = torch.tensor([[1.0], [0.0]], dtype=torch.float32, device=x.device)
        alpha, sigma = torch.where(t < 0, clean, known).reshape(2, -1, *(1,) * (x.ndim - 1))
        return alpha, sigma

    def steps(self) -> tuple[int, ...]:
        """The numbers of steps that it was distilled for, the largest first."""
        return tuple(sorted(self.facts.timesteps, reverse=True))

    def sampler(self, steps: int | None = None, stochastic: bool = False) -> Sampler:
        """The sampler of so many steps; None takes the most that it was distilled for.

        Raises:
            ValueError: it was not distilled for so many.
        """
        if stochastic:
            return Stochastic(self.schedule, timesteps=self.timesteps(steps), prediction=self.prediction)
        return DDIM(self.schedule, timesteps=self.timesteps(steps), prediction=self.prediction)

    def timesteps(self, steps: int | None = None) -> tuple[int, ...]:
        """The timesteps of so many steps. Raises as `sampler`."""
        most = self.steps()
        steps = most[0] if steps is None else integer("steps", steps, 1)
        if steps not in self.facts.timesteps:
            known = ", ".join(map(str, most))
            raise ValueError(f"steps must be one of {known}, which it was distilled for; got {steps}")
        return self.facts.timesteps[steps]

    def sample(
        self,
        shape: Sequence[int],
        steps: int | None = None,
        *,
        seed: Seed | None = None,
        index: Index = 0,
        guidance: float | Tensor | None = None,
        stochastic: bool = False,
        **conditions: Any,
    ) -> Tensor:
        """Draws samples in so many steps, one call of the network each.

        Args:
            shape: (B, ...), the batch and the shape of one sample; of an image where there is an autoencoder.
            steps: one of `steps()`; None takes the most.
            seed, index: see fastsample.Options.
            guidance: for a student of a range of guidance, the weight within it, a number or one per sample.
            stochastic: two steps forward and one back with fresh noise (Meng et al. 2023), in place of DDIM's.
                Students by consistency and lcm draw fresh noise anyway.
            **conditions: the network's keywords, such as y=labels, an entry per sample.

        Returns:
            float32 of this shape, on the network's device.

        Raises:
            ValueError: another shape, number of steps or guidance than it was distilled for.
        """
        autoencoder = self.autoencoder
        wanted = tuple(self.facts.shape) if autoencoder is None else autoencoder.config.shape
        if tuple(checked_shape("shape", shape))[1:] != wanted:
            raise ValueError(f"shape must be (B, {', '.join(map(str, wanted))}), got {tuple(shape)}")
        decode = None if autoencoder is None else autoencoder.to(next(self.network.parameters()).device).decode
        sampler = self.sampler(steps, stochastic)
        told = conditions | self.told(shape[0], len(sampler.table), guidance)
        drawn = (shape[0], *self.facts.shape)
        sample: Tensor = sampler(self, drawn, seed=seed, index=index, model_kwargs=told, decode=decode)
        return sample

    def told(self, batch: int, steps: int, guidance: float | Tensor | None) -> dict[str, Tensor]:
        """The numbers that the network is told in a run, float32 (batch,) by keyword. Raises as `sample`."""
        values: dict[str, float | Tensor] = {}
        if "steps" in self.facts.told:
            values["steps"] = float(steps)
        if isinstance(self.facts.guidance, tuple):
            least, most = self.facts.guidance
            if guidance is None:
                raise ValueError(f"guidance must be given, a weight from {least:g} to {most:g}")
            values["guidance"] = guidance
        elif guidance is not None:
            raise ValueError(f"guidance is folded in at {self.facts.guidance:g}: leave it out")
        device = next(self.network.parameters()).device
        told = {name: torch.as_tensor(value, dtype=torch.float32).to(device) for name, value in values.items()}
        for name, value in told.items():
            if value.shape not in ((), (batch,)):
                raise ValueError(f"{name} must be a number or {batch}, one per sample; got shape {tuple(value.shape)}")
            if name == "guidance" and not bool(((value >= least) & (value <= most)).all()):
                raise ValueError(f"guidance must lie in [{least:g}, {most:g}], which it was distilled for")
        return {name: value.expand(batch) for name, value in told.items()}
