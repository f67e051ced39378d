"""Noise schedules: betas and alpha bars in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastsample.checks import integer, real, real_array
from fastsample.hints import hinting, of_diffusers

Float64Array = NDArray[np.float64]

MOST_TIMESTEPS = 2**24  # what float32, in which models are given times, tells apart


def _read_only(values: ArrayLike, name: str = "values") -> Float64Array:
    array = real_array(name, values).astype(np.float64)
    array.setflags(write=False)
    return array


class Schedule:
    """A discrete forward process q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), t = 0 .. T-1.

    Immutable. Everything is float64 NumPy: in float32 the products lose up to 5e-4 of 1 - abar near t = 0.
    Made by one of the class methods; all raise ValueError for NaN, for an alpha bar outside [0, 1] and for
    alpha bars that do not strictly decrease.

    Example:
        >>> schedule = Schedule.linear(1000)
        >>> schedule.T, float(schedule.betas[0])
        (1000, 0.0001)
    """

    @hinting()
    def __init__(self, alphas_cumprod: ArrayLike) -> None:
        values = _read_only(alphas_cumprod, "alphas_cumprod")
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"alphas_cumprod must be a non-empty 1-D array, got shape {values.shape}")
        if np.isnan(values).any():
            raise ValueError(f"alphas_cumprod holds NaN, first at index {int(np.isnan(values).argmax())}")
        outside = (values < 0) | (values > 1)
        if outside.any():
            i = int(outside.argmax())
            raise ValueError(f"alphas_cumprod must lie in [0, 1], got {values[i]} at index {i}")
        flat = np.diff(values) >= 0
        if flat.any():
            i = int(flat.argmax())
            raise ValueError(
                f"alphas_cumprod must strictly decrease, got {values[i]} then {values[i + 1]} at index {i + 1} "
                "(for betas use Schedule.from_betas)"
            )
        self.__dict__["_alphas_cumprod"] = values  # __setattr__ refuses

    def __setstate__(self, state: dict[str, Float64Array]) -> None:
        # Unpickled and deep-copied arrays are writable.
        self.__dict__.update({name: _read_only(values) for name, values in state.items()})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Schedule is immutable: cannot set {name!r}")

    @classmethod
    @hinting()
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Betas evenly spaced from beta_start to beta_end (Ho et al. 2020; diffusers "linear").

        improved-diffusion scales both ends by 1000 / T; pass scaled ends to follow it.
        """
        first, last = real("beta_start", beta_start), real("beta_end", beta_end)
        with np.errstate(invalid="ignore"):  # an infinite end, which is refused as no beta
            betas = np.linspace(first, last, _length(T))
        return cls.from_betas(betas)

    @classmethod
    @hinting()
    def scaled_linear(cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
        """Betas whose square roots are evenly spaced (latent diffusion; diffusers "scaled_linear")."""
        first, last = real("beta_start", beta_start), real("beta_end", beta_end)
        if not (0 < first <= 1 and 0 < last <= 1):
            raise ValueError(f"beta_start and beta_end must lie in (0, 1], got {first} and {last}")
        return cls.from_betas(np.linspace(first**0.5, last**0.5, _length(T)) ** 2)

    @classmethod
    @hinting()
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """abar(u) = cos^2((u + s) / (1 + s) * pi / 2), beta_i = min(1 - abar((i+1)/T) / abar(i/T), max_beta).

        Nichol & Dhariwal 2021; diffusers "squaredcos_cap_v2".
        """
        s, max_beta = real("s", s), real("max_beta", max_beta)
        if not 0 <= s < np.inf:
            raise ValueError(f"s must be at least 0 and finite, got {s}")
        if not 0 < max_beta <= 1:
            raise ValueError(f"max_beta must lie in (0, 1], got {max_beta}")
        T = _length(T)
        u = np.arange(T + 1) / T
        alpha_bar = np.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        return cls.from_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta))

    @classmethod
    @hinting()
    def from_betas(cls, betas: Sequence[float] | ArrayLike) -> Schedule:
        """abar_t = prod_{i <= t} (1 - beta_i). Betas must lie in (0, 1]; only the last may be 1."""
        values = _read_only(betas, "betas")
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"betas must be a non-empty 1-D array, got shape {values.shape}")
        if np.isnan(values).any():
            raise ValueError(f"betas hold NaN, first at index {int(np.isnan(values).argmax())}")
        outside = (values <= 0) | (values > 1)
        if outside.any():
            i = int(outside.argmax())
            raise ValueError(f"betas must lie in (0, 1], got {values[i]} at index {i}")
        schedule = cls(np.cumprod(1 - values))
        schedule.__dict__["betas"] = values
        return schedule

    @classmethod
    @hinting()
    def from_alphas_cumprod(cls, alphas_cumprod: Sequence[float] | ArrayLike) -> Schedule:
        """The process with these alpha bars, descending from (at most) 1 to (at least) 0."""
        return cls(alphas_cumprod)

    def rescale_zero_terminal_snr(self) -> Schedule:
        """The schedule with abar_{T-1} = 0: sqrt(abar) shifted and scaled so that its first value stays.

        Lin et al. 2023, "Common diffusion noise schedules and sample steps are flawed", as in diffusers. Predicting
        epsilon is impossible at the last timestep of the result; use v or x0 prediction.
        """
        if self.T == 1:
            raise ValueError("a schedule of one timestep cannot be rescaled to zero terminal SNR")
        root = np.sqrt(self.alphas_cumprod)
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return type(self)(root**2)

    @property
    def T(self) -> int:
        """Number of timesteps."""
        return int(self.alphas_cumprod.size)

    @property
    def alphas_cumprod(self) -> Float64Array:
        """abar_t, shape (T,), read-only float64, strictly decreasing."""
        values: Float64Array = self.__dict__["_alphas_cumprod"]
        return values

    @cached_property
    def betas(self) -> Float64Array:
        """beta_t = 1 - abar_t / abar_{t-1}, shape (T,), read-only float64."""
        previous = np.concatenate(([1.0], self.alphas_cumprod[:-1]))
        return _read_only(1 - self.alphas_cumprod / previous)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return np.array_equal(self.alphas_cumprod, other.alphas_cumprod)

    def __hash__(self) -> int:
        return hash((self.alphas_cumprod + 0.0).tobytes())  # -0.0 equals 0.0

    def __repr__(self) -> str:
        first, last = self.alphas_cumprod[0], self.alphas_cumprod[-1]
        return f"Schedule(T={self.T}, alphas_cumprod={first:.6g} .. {last:.6g})"


def checked_schedule(schedule: object) -> Schedule:
    """The same schedule. Raises TypeError for anything else."""
    if not isinstance(schedule, Schedule):
        got = f"{type(schedule).__name__}{of_diffusers(schedule)}"
        raise TypeError(f"schedule must be a fastsample.Schedule, got {got}")
    return schedule


def _length(T: int) -> int:
    return integer("T", T, 1, MOST_TIMESTEPS)
