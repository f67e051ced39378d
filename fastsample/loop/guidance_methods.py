"""Guidance as one object, and its methods beside the plain one: CFG-Zero* and adaptive projected guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.checks import integer, one_of, real
from fastsample.ops.bend import METHODS, Bend, Method, Settings


@dataclass(frozen=True, kw_only=True, eq=False)
class Guidance:
    """Classifier-free guidance with all that belongs to it, for `guidance=` of every sampler.

    With the model's outputs m_u and m_c, the weight w, and dot products over all of a sample:

        plain          m = m_u + w (m_c - m_u)                                       (Ho & Salimans 2022)
        cfg_zero_star  m = a m_u + w (m_c - a m_u),  a = <m_c, m_u> / (|m_u|^2 + 1e-8)   (Fan et al. 2025)
        apg            m = m_u + w (D - (1 - eta) <D, m_c> / |m_c|^2 m_c)            (Sadat et al. 2024)

    CFG-Zero* lets the model's output be 0 in the guided ones of the first `zero_init_steps` rows of a run. APG has
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
        ValueError, TypeError: an unknown method, or a value out of its range. Weight, rescale and interval are checked
            by the run.

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
        if self.weight is None or isinstance(self.weight, Guidance):
            raise TypeError(f"weight must be a number or one per sample, got {self.weight!r}")
        one_of("method", self.method, METHODS)
        integer("zero_init_steps", self.zero_init_steps, 0)
        for name in ("eta", "norm_threshold", "momentum"):
            if not math.isfinite(real(name, getattr(self, name))):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if not self.norm_threshold >= 0:
            raise ValueError(f"norm_threshold must not be negative, got {self.norm_threshold}")
        if not abs(self.momentum) < 1:
            raise ValueError(f"momentum must lie between -1 and 1, got {self.momentum}")


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
