"""Consistency models (Song et al. 2023): one step to clean data, or a few with fresh noise between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fastsample.checks import check_positive
from fastsample.loop.options import CorrectX0
from fastsample.samplers.limits import Clip, limit_columns
from fastsample.samplers.sampler import Sampler
from fastsample.samplers.sampling_function import sampling_function
from fastsample.schedule import Float64Array
from fastsample.tables import Table


@dataclass(frozen=True, kw_only=True)
class Consistency(Sampler):
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
        model: ... Here it is called as model(c_in x, t, **model_kwargs), t float32 of shape (B,).
        x: ... Drawn noise is multiplied by sigmas[0], and a given x_T lies at that level.
        sigmas: the noise levels at which the model is called, descending: some of those that it was trained on, such as
            karras_sigmas(80.0, 0.002, 40)[[0, 22]]: "ts 0,22,39" of consistency_models, timesteps=[22, 0] of diffusers.
        sigma_min, sigma_data: as in training.
        clip: ... 1 in both peers.

    Raises:
        ValueError: for sigmas that do not descend or fall below sigma_min, and for a scale that is not positive.

    Example:
        >>> from fastsample import karras_sigmas
        >>> sigmas = karras_sigmas(80.0, 0.002, 40)[[0, 22]]
        >>> consistency(lambda x, t: 0.1 * x, (2, 3, 8, 8), sigmas=sigmas, seed=0).shape
        torch.Size([2, 3, 8, 8])
        >>> sampler = Consistency(sigmas=sigmas)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

    sigmas: Iterable[float] = (80.0,)
    sigma_min: float = 0.002
    sigma_data: float = 0.5
    clip: Clip = 1.0
    correct_x0: CorrectX0 | None = None

    def __post_init__(self) -> None:
        try:
            sigmas = np.array([float(value) for value in self.sigmas])
        except (TypeError, ValueError):
            raise TypeError(f"sigmas must be a list of numbers, got {self.sigmas!r}") from None
        self._set(sigmas=tuple(sigmas.tolist()), table=self._rows(sigmas))

    def _rows(self, sigmas: Float64Array) -> Table:
        sigma_min, sigma_data = self.sigma_min, self.sigma_data
        check_positive("sigma_min", sigma_min)
        check_positive("sigma_data", sigma_data)
        descend = sigmas.size > 0 and np.isfinite(sigmas).all() and (np.diff(sigmas) < 0).all()
        if not descend or sigmas[-1] < sigma_min:
            raise ValueError(
                f"sigmas must strictly descend and not fall below sigma_min={sigma_min}, got {sigmas.tolist()}"
            )
        c_skip, c_out = scalings(sigmas, sigma_min, sigma_data)
        later = np.append(sigmas[1:], sigma_min)
        return Table(
            (250 * np.log(sigmas)).astype(np.float32),
            p=c_skip,
            q=c_out,
            b=1.0,
            s=np.sqrt(later**2 - sigma_min**2),
            e=1 / np.sqrt(sigmas**2 + sigma_data**2),
            **limit_columns(self.clip),
            alpha=np.ones(len(sigmas) + 1),
            sigma=np.append(sigmas, 0.0),  # the result counts as clean
            init_noise_sigma=sigmas[0],
        )


def scalings(sigma: Float64Array, sigma_min: float, sigma_data: float) -> tuple[Float64Array, Float64Array]:
    """(c_skip, c_out) at noise levels; (1, 0) at sigma_min, where a consistency model returns what it is given."""
    c_skip = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)
    return c_skip, (sigma - sigma_min) * sigma_data / np.sqrt(sigma**2 + sigma_data**2)


consistency = sampling_function(Consistency, "consistency")
