"""Consistency models (Song et al. 2023): one step to clean data, or a few with fresh noise between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from typing_extensions import Unpack

from fastsample.loop.loop import CorrectX0
from fastsample.loop.options import Options
from fastsample.model import Model
from fastsample.samplers.kept import sampler_of
from fastsample.samplers.limits import Clip, check_number, limit_columns
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array
from fastsample.tables import Table


def consistency_table(
    sigmas: Float64Array, *, sigma_min: float = 0.002, sigma_data: float = 0.5, clip: Clip = 1.0
) -> Table:
    """The rows x' = x0 + sqrt(sigma'^2 - sigma_min^2) z; see `consistency`.

    Args:
        sigmas: noise levels, shape (N,), strictly descending.
        sigma_min, sigma_data, clip: as for `consistency`.

    Raises:
        ValueError: for sigmas that do not descend or fall below sigma_min, and for a scale that is not positive.
    """
    for name, value in (("sigma_min", sigma_min), ("sigma_data", sigma_data)):
        check_number(name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    descend = sigmas.ndim == 1 and sigmas.size > 0 and np.isfinite(sigmas).all() and (np.diff(sigmas) < 0).all()
    if not descend or sigmas[-1] < sigma_min:
        raise ValueError(
            f"sigmas must strictly descend and not fall below sigma_min={sigma_min}, got {sigmas.tolist()}"
        )
    scale = np.sqrt(sigmas**2 + sigma_data**2)
    later = np.append(sigmas[1:], sigma_min)
    return Table(
        (250 * np.log(sigmas)).astype(np.float32),
        p=sigma_data**2 / ((sigmas - sigma_min) ** 2 + sigma_data**2),
        q=(sigmas - sigma_min) * sigma_data / scale,
        b=1.0,
        s=np.sqrt(later**2 - sigma_min**2),
        e=1 / scale,
        **limit_columns(clip),
        alpha=np.ones(len(sigmas) + 1),
        sigma=np.append(sigmas, 0.0),  # the result counts as clean
        init_noise_sigma=sigmas[0],
    )


@dataclass(frozen=True)
class Consistency(Sampler):
    """A consistency sampler: the arguments of `consistency` that shape the table. Immutable and reusable.

    Example:
        >>> from fastsample.times.continuous import karras_sigmas
        >>> sampler = Consistency(sigmas=karras_sigmas(80.0, 0.002, 40)[[0, 22]])
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

    sigmas: Iterable[float] = field(default=(80.0,), kw_only=True)
    sigma_min: float = field(default=0.002, kw_only=True)
    sigma_data: float = field(default=0.5, kw_only=True)
    clip: Clip = field(default=1.0, kw_only=True)
    correct_x0: CorrectX0 | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        try:
            sigmas = np.array([float(value) for value in self.sigmas])
        except (TypeError, ValueError):
            raise TypeError(f"sigmas must be a list of numbers, got {self.sigmas!r}") from None
        table = consistency_table(sigmas, sigma_min=self.sigma_min, sigma_data=self.sigma_data, clip=self.clip)
        self._set(sigmas=tuple(sigmas.tolist()), table=table)


def consistency(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    sigmas: Iterable[float] = (80.0,),
    sigma_min: float = 0.002,
    sigma_data: float = 0.5,
    clip: Clip = 1.0,
    correct_x0: CorrectX0 | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Samples from a consistency model (Song et al. 2023), in one step or in one per entry of `sigmas`.

    At noise level sigma (x = clean + sigma z), on the way to the next one, sigma':

        c_skip = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2)
        c_out  = (sigma - sigma_min) sigma_data / sqrt(sigma^2 + sigma_data^2)
        c_in   = 1 / sqrt(sigma^2 + sigma_data^2)
        x0     = c_skip x + c_out model(c_in x, 250 ln sigma)
        x'     = x0 + sqrt(sigma'^2 - sigma_min^2) z

    and x0 is the result of the last one. This is what consistency_models' stochastic_iterative_sampler and diffusers'
    CMStochasticIterativeScheduler compute.

    Args:
        model: called as model(c_in x, t, **model_kwargs), t float32 of shape (B,).
        x: the shape (B, ...) of the result, with x_T drawn from `seed` times sigmas[0]; or x_T itself, at that level.
        sigmas: the noise levels at which the model is called, descending: some of those that it was trained on, such as
            levels.karras_sigmas(80.0, 0.002, 40)[[0, 22]]: "ts 0,22,39" of consistency_models, timesteps=[22, 0] of
            diffusers.
        sigma_min, sigma_data: as in training.
        clip: clamp x0 to [-clip, clip], 1 as in both; a fastsample.DynamicThreshold; None for neither.
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping.
        **options: the arguments of every sampler, documented in fastsample.Options.

    Returns:
        The sample, float32 (float64 for a float64 x).

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.

    Example:
        >>> from fastsample.times.continuous import karras_sigmas
        >>> sigmas = karras_sigmas(80.0, 0.002, 40)[[0, 22]]
        >>> consistency(lambda x, t: 0.1 * x, (2, 3, 8, 8), sigmas=sigmas, seed=0).shape
        torch.Size([2, 3, 8, 8])
    """
    sampler = sampler_of(
        Consistency, sigmas=sigmas, sigma_min=sigma_min, sigma_data=sigma_data, clip=clip, correct_x0=correct_x0
    )
    return sampler(model, x, **options)
