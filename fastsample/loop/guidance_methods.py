"""Guidance as one object, and its methods beside the plain one: CFG-Zero* and adaptive projected guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.checks import integer, one_of, real
from fastsample.hints import hinting_class
from fastsample.ops.bend import METHODS, Bend, Method, Settings
from fastsample.ops.checks import check_rescale, check_weights
from fastsample.vocabulary import OF_RUNS

# Of each argument that is not for every method: which ones have it.
_OF_METHODS: dict[str, Method] = {
    "zero_init_steps": "cfg_zero_star",
    "eta": "apg",
    "norm_threshold": "apg",
    "momentum": "apg",
}


@hinting_class(**dict.fromkeys(OF_RUNS, "the sampler's call"))
@dataclass(frozen=True, kw_only=True, eq=False)
class Guidance:
    """Classifier-free guidance with all that belongs to it, for `guidance=` of every sampler.

    With the model's outputs m_u and m_c, the weight w, and dot products over all of a sample:

        plain          m = m_u + w (m_c - m_u)                                       (Ho & Salimans 2022)
        cfg_zero_star  m = a m_u + w (m_c - a m_u),  a = <m_c, m_u> / (|m_u|^2 + 1e-8)   (Fan et al. 2025)
        apg            m = m_u + w (D - (1 - eta) <D, m_c> / |m_c|^2 m_c)            (Sadat et al. 2024)

    CFG-Zero* lets the model's output be 0 in the guided ones of the first `zero_init_steps` rows of a run, which must
    have more rows than that: a flow would return the noise that it started from. APG has
    D = min(1, r / |d|) d with d = m_c - m_u + momentum d', where r is `norm_threshold` and d' that of the row before.
    After either comes the rescaling of Options' guidance_rescale. They are diffusers' ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance and AdaptiveProjectedGuidance. By their own defaults the latter two have
    zero_init_steps=1, and eta=1.0 with momentum=0.0.

    Args:
        weight: w, a number or one per sample. A sample whose w is 1 gets m_c as it is, by every method.
        rescale: phi in [0, 1]: m is scaled by phi std(m_c) / std(m) + 1 - phi, per sample.
        interval: (t_lo, t_hi), see fastsample.Options.
        method: "plain", "cfg_zero_star", or "apg".
        zero_init_steps: of CFG-Zero*. 1, which diffusers takes, lets a flow stay where it is for a row; a model of the
            noise or of v is not to be told 0.
        eta: of APG, how much of the part along m_c is kept. 1 keeps all.
        norm_threshold: r of APG; 0 for no limit. The paper's 15 is for SDXL's latents, 2.5 for Stable Diffusion's.
        momentum: of APG; negative pushes away from what was done before. 0 remembers nothing.

    Raises:
        ValueError, TypeError: an unknown method, a value out of its range, and one other than the default for an
            argument that the method does not have. By the run: weights for another number of samples, an interval that
            holds none of its times, and as many zero_init_steps as it has rows.

    Example:
        >>> import fastsample
        >>> def model(x, t, c):
        ...     return 0.1 * x + c.reshape(-1, 1, 1, 1)
        >>> keywords = {"cond": {"c": torch.ones(2)}, "uncond": {"c": torch.zeros(2)}}
        >>> apg = Guidance(weight=7.5, method="apg", norm_threshold=2.5)
        >>> fastsample.ddim(model, (2, 3, 8, 8), steps=10, guidance=apg, **keywords).shape
        torch.Size([2, 3, 8, 8])
    """

    weight: float | Sequence[float] | Tensor
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    method: Method = "plain"
    zero_init_steps: int = 0
    eta: float = 0.0
    norm_threshold: float = 15.0
    momentum: float = -0.5

    def __post_init__(self) -> None:
        check_weights("weight", self.weight)
        check_rescale(self.rescale, guided=True, name="rescale")
        if self.interval is not None:
            checked_interval("interval", self.interval)
        one_of("method", self.method, METHODS)
        integer("zero_init_steps", self.zero_init_steps, 0)
        for name in ("eta", "norm_threshold", "momentum"):
            if not math.isfinite(real(name, getattr(self, name))):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if not self.norm_threshold >= 0:
            raise ValueError(f"norm_threshold must not be negative, got {self.norm_threshold}")
        if not abs(self.momentum) < 1:
            raise ValueError(f"momentum must lie between -1 and 1, got {self.momentum}")
        for name, method in _OF_METHODS.items():
            if method != self.method and getattr(self, name) != getattr(Guidance, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} is for method={method!r}, and this is method={self.method!r}"
                )


def checked_interval(name: str, interval: tuple[float, float]) -> tuple[float, float]:
    """(t_lo, t_hi) as two floats. Raises TypeError for what is none, ValueError unless t_lo <= t_hi."""
    try:
        if isinstance(interval, str | bytes | Set | Mapping):
            raise TypeError
        low, high = (real(name, end) for end in interval)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be (t_lo, t_hi), got {interval!r}") from None
    if not low <= high:
        raise ValueError(f"{name} must be (t_lo, t_hi) with t_lo <= t_hi, got {interval}")
    return low, high


class Bending:
    """A method other than the plain one in a run: makes one output of both halves, before the step.

    Args:
        guidance: the method and what it takes.
        weights: w, one per sample.
        backend: see fastsample.backends().
    """

    def __init__(self, guidance: Guidance, weights: Tensor, backend: str) -> None:
        self._zero_rows = guidance.zero_init_steps if guidance.method == "cfg_zero_star" else 0
        self._weights, self._bend = weights, Bend(_settings_of(guidance), weights, backend)

    def check_rows(self, rows: int) -> None:
        """Raises ValueError where the output would be 0 in every row of a run of so many."""
        if self._zero_rows >= rows:
            raise ValueError(
                f"guidance.zero_init_steps must be less than the run's {rows} rows, whose outputs would all be 0, got "
                f"{self._zero_rows}"
            )

    def begin(self) -> None:
        """Before the first row of every run."""
        self._bend.begin()

    def __call__(self, output: Tensor, channels: int, row: int) -> Tensor:
        """The output of a guided row, (B, ...), where `output` has both halves, (2B, ...); a variance is the second's.

        Args:
            channels: of the state.
            row: the row's place in the run.
        """
        m = self._bend(output, channels)
        if row >= self._zero_rows:
            return m
        of_state = m[:, :channels] if m.ndim > 1 else m
        zeros = torch.where(per_sample(self._weights, of_state) == 1, of_state, 0.0)
        return torch.cat([zeros, m[:, channels:]], dim=1) if m.ndim > 1 else zeros


def _settings_of(guidance: Guidance) -> Settings:
    if guidance.method != "apg":
        return Settings(guidance.method, float(guidance.rescale))
    numbers = guidance.rescale, guidance.eta, guidance.norm_threshold, guidance.momentum
    return Settings(guidance.method, *map(float, numbers))
