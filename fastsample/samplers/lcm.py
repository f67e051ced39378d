"""Latent consistency models (Luo et al. 2023): a few steps, each to clean data and back to the next noise level."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from fastsample.loop.loop import CorrectX0
from fastsample.loop.options import Options, Step
from fastsample.model import Model, Predictor, schedule_of
from fastsample.model.called_modules import attribute
from fastsample.ops.noise import checked_shape
from fastsample.samplers.kept import sampler_of
from fastsample.samplers.limits import Clip, check_number, limit_columns
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array, Schedule
from fastsample.tables import Table
from fastsample.times.levels import noise_levels
from fastsample.times.predictions import x0_coefficients
from fastsample.times.timesteps import Int64Array, Timesteps, spaced_timesteps


def lcm_table(
    t: np.ndarray,
    alpha: Float64Array,
    sigma: Float64Array,
    *,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
    prediction: str = "epsilon",
    clip: Clip = None,
) -> Table:
    """The rows x' = alpha' (c_skip x + c_out x0) + sigma' z; see `lcm`.

    Args:
        t: times for the model, shape (N,).
        alpha, sigma: noise levels, shape (N + 1,), from the noisiest to clean data, (1, 0).
        timestep_scaling, sigma_data, prediction, clip: as for `lcm`.

    Raises:
        ValueError: for a scale that is not positive, and for a prediction that cannot work at one of the levels.
    """
    for name, value in (("timestep_scaling", timestep_scaling), ("sigma_data", sigma_data)):
        check_number(name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    scaled = t * timestep_scaling
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / np.sqrt(scaled**2 + sigma_data**2)
    p, q = x0_coefficients(prediction, alpha[:-1], sigma[:-1])
    return Table(
        t,
        p=p,
        q=q,
        a=alpha[1:] * c_skip,
        b=alpha[1:] * c_out,
        s=sigma[1:],
        **limit_columns(clip),
        alpha=alpha,
        sigma=sigma,
    )


def guidance_scale_embedding(w: float | Sequence[float] | Tensor, dim: int) -> Tensor:
    """What a guidance-distilled model is told of the guidance scale: sines, then cosines, of 1000 (w - 1) f_i.

    f_i = 10000^(-i / (dim/2 - 1)), i = 0 .. dim/2 - 1, as in the training script of latent consistency models.

    Args:
        w: the guidance scale m_u + w (m_c - m_u), a number or one per sample.
        dim: length of an embedding, even and at least 4: the model's `config.time_cond_proj_dim`.

    Returns:
        float32 of shape (1, dim) for a number, else (B, dim).

    Raises:
        TypeError: for a w that is neither. ValueError: for another shape of w or a dim that is odd or below 4.

    Example:
        >>> guidance_scale_embedding([1.0, 8.0], 256)[0, [0, -1]]
        tensor([0., 1.])
    """
    try:
        scale = torch.as_tensor(w, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"the guidance scale must be a number or one per sample, got {w!r}") from None
    if scale.ndim > 1:
        raise ValueError(f"the guidance scale must be a number or one per sample, got shape {tuple(scale.shape)}")
    if dim < 4 or dim % 2:
        raise ValueError(f"dim must be even and at least 4, got {dim}")
    # In float32, as the models were trained: at these angles float64 would differ in the fourth digit.
    frequency = torch.exp(
        torch.arange(dim // 2, dtype=torch.float32, device="cpu") * -(math.log(10000.0) / (dim // 2 - 1))
    )
    angle = (scale.reshape(-1, 1) - 1) * 1000 * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=1)


@dataclass(frozen=True)
class LCM(Sampler):
    """A latent consistency sampler: the arguments of `lcm` that shape the table. Immutable and reusable.

    Example:
        >>> sampler = LCM(Schedule.scaled_linear(), steps=4)
        >>> sampler.table.t.tolist()
        [999, 759, 499, 259]
        >>> sampler(lambda x, t: 0.1 * x, (2, 4, 8, 8), seed=1).shape
        torch.Size([2, 4, 8, 8])
    """

    schedule: Schedule
    steps: int = field(default=4, kw_only=True)
    timesteps: Timesteps = field(default="lcm", kw_only=True)
    original_steps: int = field(default=50, kw_only=True)
    timestep_scaling: float = field(default=10.0, kw_only=True)
    sigma_data: float = field(default=0.5, kw_only=True)
    prediction: str = field(default="epsilon", kw_only=True)
    clip: Clip = field(default=None, kw_only=True)
    correct_x0: CorrectX0 | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        t = self._spaced(functools.partial(spaced_timesteps, original_steps=self.original_steps))
        self._set(table=self._rows(t))

    def _rows(self, t: Int64Array) -> Table:
        return lcm_table(
            t,
            *noise_levels(self.schedule, t),
            timestep_scaling=self.timestep_scaling,
            sigma_data=self.sigma_data,
            prediction=self.prediction,
            clip=self.clip,
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
        return self._rows(spaced_timesteps(stride * reached, "lcm", self.steps, original_steps=reached)), 0

    def __call__(
        self,
        model: Model,
        x: Tensor | Sequence[int],
        *,
        guidance_embedding: float | Sequence[float] | Tensor | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """Samples from the model; see `lcm` for guidance_embedding, fastsample.Options for the options."""
        return super().__call__(model, x, guidance_embedding=guidance_embedding, **options)  # type: ignore[call-arg]

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
        return _told_guidance(model, x, options.pop("guidance_embedding", None), options)


def _told_guidance(
    model: Model, x: Tensor | Sequence[int], w: float | Sequence[float] | Tensor | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The options with the embedding of w among the model's keywords."""
    if w is None:
        return options
    dim = getattr(attribute(model, "config", object), "time_cond_proj_dim", None)
    if not isinstance(dim, int):
        raise ValueError(
            "guidance_embedding needs a model with config.time_cond_proj_dim; for another pass model_kwargs="
            "{'timestep_cond': fastsample.guidance_scale_embedding(w, dim)}"
        )
    batch = checked_shape("x", x.shape if isinstance(x, Tensor) else x)[0]
    embedding = guidance_scale_embedding(w, dim)
    if len(embedding) not in (1, batch):
        raise ValueError(f"guidance_embedding must be a number or {batch}, one per sample; got {len(embedding)}")
    predictor = Predictor(model, options.get("model_dtype"))
    embedding = embedding.expand(batch, -1).to(predictor.device or options.get("device"), predictor.dtype)
    return {**options, "model_kwargs": {**(options.get("model_kwargs") or {}), "timestep_cond": embedding}}


def lcm(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 4,
    guidance_embedding: float | Sequence[float] | Tensor | None = None,
    schedule: Schedule | None = None,
    timesteps: Timesteps = "lcm",
    original_steps: int = 50,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
    prediction: str = "epsilon",
    clip: Clip = None,
    correct_x0: CorrectX0 | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Samples from a latent consistency model (Luo et al. 2023), as diffusers' LCMScheduler does.

    From timestep t to the next entry of the list, with its alpha bar a' (1 after the last) and r = timestep_scaling t:

        c_skip = sigma_data^2 / (r^2 + sigma_data^2)
        c_out  = r / sqrt(r^2 + sigma_data^2)
        x'     = sqrt(a') (c_skip x + c_out x0) + sqrt(1 - a') z

    so the last row adds no noise.

    Args:
        model: as for `ddim`, distilled to jump to x0 from any of its timesteps; or any model under an LCM-LoRA.
        x: the shape (B, ...) of the result, or x_T itself, as for `ddim`.
        steps: model calls, where `timesteps` names a spacing; at most `original_steps` for "lcm".
        guidance_embedding: the guidance scale w that a model with `config.time_cond_proj_dim` is told, a number or one
            per sample: it is given guidance_scale_embedding(w, time_cond_proj_dim) as the keyword `timestep_cond`. Such
            a model needs no second, unconditional call.
        schedule: the one the model was trained with; default `model.schedule`, else Schedule.linear(1000). Stable
            Diffusion's is Schedule.scaled_linear().
        timesteps: see fastsample.spaced_timesteps; default some of the timesteps of the distillation.
        original_steps: how many timesteps the model was distilled at.
        timestep_scaling, sigma_data: of the boundary scalings, as in the distillation.
        prediction: what the model predicts: "epsilon", "v" or "x0".
        clip: clamp x0 to [-clip, clip]; a fastsample.DynamicThreshold; None for neither.
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping.
        **options: the arguments of every sampler, documented in fastsample.Options. With `strength` and timesteps "lcm"
            all `steps` are made, from timestep k floor(original_steps strength) - 1 on, k = T // original_steps.

    Returns:
        The sample, float32 (float64 for a float64 x).

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.

    Example:
        >>> lcm(lambda x, t: 0.1 * x, (2, 4, 8, 8), steps=4, schedule=Schedule.scaled_linear(), seed=0).shape
        torch.Size([2, 4, 8, 8])
    """
    sampler = sampler_of(
        LCM,
        schedule_of(model, schedule),
        steps=steps,
        timesteps=timesteps,
        original_steps=original_steps,
        timestep_scaling=timestep_scaling,
        sigma_data=sigma_data,
        prediction=prediction,
        clip=clip,
        correct_x0=correct_x0,
    )
    return sampler(model, x, guidance_embedding=guidance_embedding, **options)
