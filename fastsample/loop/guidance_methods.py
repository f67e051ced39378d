"""Guidance as one object, and its methods beside the plain one: CFG-Zero* and adaptive projected guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.checks import integer, one_of, real
from fastsample.ops.step.reductions import rescale_factor

METHODS = ("plain", "cfg_zero_star", "apg")
_TINY = 1e-8  # beside a squared norm, as the authors have it


@dataclass(frozen=True, kw_only=True, eq=False)
class Guidance:
    """Classifier-free guidance with all that belongs to it, for `guidance=` of every sampler.

    With the model's outputs m_u and m_c, the weight w, and dot products over all of a sample:

        plain          m = m_u + w (m_c - m_u)                                       (Ho & Salimans 2022)
        cfg_zero_star  m = a m_u + w (m_c - a m_u),  a = <m_c, m_u> / |m_u|^2        (Fan et al. 2025)
        apg            m = m_u + w (D - (1 - eta) <D, m_c> / |m_c|^2 m_c)            (Sadat et al. 2024)

    CFG-Zero* lets the model's output be 0 in the guided ones of the first `zero_init_steps` rows of a run. APG has
    D = min(1, r / |d|) d with d = m_c - m_u + momentum d', where r is `norm_threshold` and d' that of the row before.
    After either comes the rescaling of Options' guidance_rescale. They are diffusers' ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance and AdaptiveProjectedGuidance.

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
    method: str = "plain"
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
    """

    def __init__(self, guidance: Guidance, weights: Tensor) -> None:
        self._guidance, self._weights = guidance, weights
        self.begin()

    def begin(self) -> None:
        """Before the first row of every run."""
        self._before = torch.zeros(())

    def __call__(self, output: Tensor, channels: int, row: int) -> Tensor:
        """The output of a guided row, (B, ...), where `output` has both halves, (2B, ...); a variance is the second's.

        Args:
            channels: of the state.
            row: the row's place in the run.
        """
        batch = len(output) // 2
        rest = None
        if output.ndim > 1 and output.shape[1] > channels:
            output, rest = output[:, :channels], output[batch:, channels:]
        unconditional, conditional = (
            half.to(torch.promote_types(half.dtype, torch.float32)) for half in output.split(batch)
        )
        combined = self._combined(unconditional, conditional, row)
        return combined if rest is None else torch.cat([combined, rest.to(combined.dtype)], dim=1)

    def _combined(self, unconditional: Tensor, conditional: Tensor, row: int) -> Tensor:
        guidance, weight = self._guidance, per_sample(self._weights, conditional)
        alone = weight == 1
        if guidance.method == "cfg_zero_star":
            if row < guidance.zero_init_steps:
                return torch.where(alone, conditional, 0.0)
            size = _dot(unconditional, unconditional) + _TINY
            unconditional = unconditional * per_sample(_dot(conditional, unconditional) / size, unconditional)
            combined = unconditional + weight * (conditional - unconditional)
        else:
            combined = unconditional + weight * self._projected(conditional - unconditional, conditional)
        if guidance.rescale != 0:
            combined = combined * rescale_factor(combined, conditional, guidance.rescale)
        return torch.where(alone, conditional, combined)

    def _projected(self, difference: Tensor, conditional: Tensor) -> Tensor:
        guidance = self._guidance
        if guidance.momentum != 0:
            difference = self._before = difference + guidance.momentum * self._before.to(difference)
        if guidance.norm_threshold > 0:
            size = _dot(difference, difference).clamp(min=_TINY**2).sqrt()  # of which 0 has no derivative
            difference = difference * per_sample((guidance.norm_threshold / size).clamp(max=1), difference)
        along = _dot(difference, conditional) / _dot(conditional, conditional).clamp(min=_TINY**2)
        return difference - (1 - guidance.eta) * per_sample(along, conditional) * conditional


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Of each sample, added up in float64."""
    return (one * other).reshape(len(one), -1).sum(1, dtype=torch.float64).to(one.dtype)
