"""Latent consistency models (Luo et al. 2023): a few steps, each to clean data and back to the next noise level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Unpack

from fastsample.checks import check_positive
from fastsample.loop.options import CorrectX0, Decode, Decoded, Options, Step, Undecoded
from fastsample.model import Model
from fastsample.samplers.columns import x0_table
from fastsample.samplers.guidance_embedding import told_guidance
from fastsample.samplers.limits import Clip
from fastsample.samplers.sampling_function import sampling_function
from fastsample.samplers.spaced import Spaced
from fastsample.schedule import Float64Array
from fastsample.tables import Table
from fastsample.times.predictions import Prediction
from fastsample.times.timesteps import Timesteps, spaced_timesteps


@dataclass(frozen=True, kw_only=True)
class LCM(Spaced):
    """Samples from a latent consistency model (Luo et al. 2023), as diffusers' LCMScheduler does.

    From timestep t to the next entry of the list, with its alpha bar a' (1 after the last) and r = timestep_scaling t:

        c_skip = sigma_data^2 / (r^2 + sigma_data^2)
        c_out  = r / sqrt(r^2 + sigma_data^2)
        x'     = sqrt(a') (c_skip x + c_out x0) + sqrt(1 - a') z

    so the last row adds no noise.

    Args:
        model: ... Distilled to jump to x0 from any of its timesteps; or any model under an LCM-LoRA.
        steps: ... At most `original_steps` for "lcm".
        schedule: ... Stable Diffusion's is Schedule.scaled_linear().
        timesteps: ... The default takes some of the timesteps of the distillation.
        timestep_scaling, sigma_data: of the boundary scalings, as in the distillation.
        **options: ... With `strength` and timesteps "lcm" all `steps` are made, from timestep
            k floor(original_steps strength) - 1 on, k = T // original_steps.

    Raises:
        ValueError: for a scale that is not positive, and for a prediction that cannot work at one of the levels.

    Example:
        >>> from fastsample import Schedule
        >>> lcm(lambda x, t: 0.1 * x, (2, 4, 8, 8), steps=4, schedule=Schedule.scaled_linear(), seed=0).shape
        torch.Size([2, 4, 8, 8])
        >>> sampler = LCM(Schedule.scaled_linear(), steps=4)
        >>> sampler.table.t.tolist()
        [999, 759, 499, 259]
        >>> sampler(lambda x, t: 0.1 * x, (2, 4, 8, 8), seed=1).shape
        torch.Size([2, 4, 8, 8])
    """

    steps: int = 4
    timesteps: Timesteps = "lcm"
    original_steps: int = 50
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5
    prediction: Prediction = "epsilon"
    clip: Clip = None
    correct_x0: CorrectX0 | None = None

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        check_positive("timestep_scaling", self.timestep_scaling)
        check_positive("sigma_data", self.sigma_data)
        c_skip, c_out = boundary(t, self.timestep_scaling, self.sigma_data)
        return x0_table(
            t,
            alpha,
            sigma,
            prediction=self.prediction,
            clip=self.clip,
            a=alpha[1:] * c_skip,
            b=alpha[1:] * c_out,
            s=sigma[1:],
        )

    def _part(self, strength: float) -> tuple[Table, int]:
        """All the steps, among the first `strength` of the distillation's timesteps, as LCMScheduler has it."""
        if self.timesteps != "lcm" or strength == 1:
            return super()._part(strength)
        reached = int(self.original_steps * strength)
        if reached < self.steps:
            raise ValueError(
                f"strength={strength} leaves {reached} of original_steps={self.original_steps} timesteps, fewer than "
                f"steps={self.steps}"
            )
        stride = self.schedule.T // self.original_steps
        t = spaced_timesteps(stride * reached, "lcm", self.steps, original_steps=reached)
        return self._rows(t, *self._levels(t)), 0

    def __call__(
        self,
        model: Model,
        x: Tensor | Sequence[int],
        *,
        guidance_embedding: float | Sequence[float] | Tensor | None = None,
        decode: Decode[Decoded] | None = None,
        **options: Unpack[Undecoded],
    ) -> Decoded:
        """Samples from the model.

        Args:
            model, x: see fastsample.lcm.
            guidance_embedding: the guidance scale w that a model with `config.time_cond_proj_dim` is told, a number or
                one per sample: it is given guidance_scale_embedding(w, time_cond_proj_dim) as the keyword
                `timestep_cond`. Such a model needs no second, unconditional call.
            decode: what to make of the sample before it is returned, see fastsample.Options.
            **options: see fastsample.Options.
        """
        own: Any = {"guidance_embedding": guidance_embedding}  # which `_own_options` expresses otherwise
        return super().__call__(model, x, decode=decode, **options, **own)

    def iterate(
        self,
        model: Model,
        x: Tensor | Sequence[int],
        *,
        guidance_embedding: float | Sequence[float] | Tensor | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Step]:
        """The same as a generator, see Sampler.iterate."""
        return super().iterate(model, x, guidance_embedding=guidance_embedding, **options)  # type: ignore[call-arg]

    def _own_options(self, model: Model, x: Tensor | Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
        return told_guidance(model, x, options.pop("guidance_embedding", None), options)


def boundary(t: NDArray[Any], timestep_scaling: float, sigma_data: float) -> tuple[Float64Array, Float64Array]:
    """(c_skip, c_out) at timesteps; (1, 0) at 0, where a latent consistency model returns what it is given."""
    r = t * timestep_scaling
    return sigma_data**2 / (r**2 + sigma_data**2), r / np.sqrt(r**2 + sigma_data**2)


lcm = sampling_function(LCM, "lcm")
