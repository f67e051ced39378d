"""The steps as one writes them in plain torch, for torch.compile. Parameters are named as the columns of a Table.

x is the state, m the model's output, h1 to h3 the entries of earlier rows, w the guidance, and s has exp(g0) in it.
Coefficients are tensors, so that no step of a run compiles anew.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ddim(x: Tensor, m: Tensor, p: Tensor, q: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """DDIM, eta 0."""
    x0 = p * x + q * m
    return b * x0 + d * m


def clipped_ddim(x: Tensor, m: Tensor, p: Tensor, q: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """DDIM, eta 0, with a clamp."""
    x0 = (p * x + q * m).clamp(-1, 1)
    return b * x0 + d * m


def guided_ddim(x: Tensor, m: Tensor, w: Tensor, p: Tensor, q: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """DDIM, eta 0, after classifier-free guidance."""
    unconditional, conditional = m.chunk(2)
    return ddim(x, unconditional + w * (conditional - unconditional), p, q, b, d)


def dpm_solver(
    x: Tensor, m: Tensor, h1: Tensor, p: Tensor, q: Tensor, a: Tensor, b: Tensor, c1: Tensor
) -> tuple[Tensor, Tensor]:
    """DPM-Solver++ 2M: the state and the x0 that the next row reads."""
    x0 = p * x + q * m
    return a * x + b * x0 + c1 * h1, x0


def deis(
    x: Tensor, m: Tensor, h1: Tensor, h2: Tensor, p: Tensor, q: Tensor, a: Tensor, b: Tensor, c1: Tensor, c2: Tensor,
    hx: Tensor, h0: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """DEIS of order 3: the state and the epsilon that later rows read."""
    x0 = p * x + q * m
    return a * x + b * x0 + c1 * h1 + c2 * h2, hx * x + h0 * x0


def ipndm(
    x: Tensor, m: Tensor, h1: Tensor, h2: Tensor, h3: Tensor, p: Tensor, q: Tensor, a: Tensor, b: Tensor, c1: Tensor,
    c2: Tensor, c3: Tensor, hx: Tensor, h0: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """iPNDM of order 4: the state and the epsilon that later rows read."""
    x0 = p * x + q * m
    return a * x + b * x0 + c1 * h1 + c2 * h2 + c3 * h3, hx * x + h0 * x0


def ancestral_ddim(x: Tensor, m: Tensor, p: Tensor, q: Tensor, b: Tensor, d: Tensor, s: Tensor) -> Tensor:
    """DDIM, eta 1, with a clamp."""
    x0 = (p * x + q * m).clamp(-1, 1)
    return b * x0 + d * m + s * torch.randn_like(x)


def ddpm(x: Tensor, m: Tensor, p: Tensor, q: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """DDPM of fixed variance, with a clamp."""
    x0 = (p * x + q * m).clamp(-1, 1)
    return a * x + b * x0 + s * torch.randn_like(x)


def learned_ddpm(x: Tensor, m: Tensor, p: Tensor, q: Tensor, a: Tensor, b: Tensor, s: Tensor, g1: Tensor) -> Tensor:
    """DDPM of learned variance, with a clamp."""
    mean, v = m.chunk(2, dim=1)
    x0 = (p * x + q * mean).clamp(-1, 1)
    return a * x + b * x0 + s * torch.exp(g1 * v) * torch.randn_like(x)


def lcm(x: Tensor, m: Tensor, p: Tensor, q: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """A latent consistency model's step."""
    x0 = p * x + q * m
    return a * x + b * x0 + s * torch.randn_like(x)


def tcd(x: Tensor, m: Tensor, p: Tensor, q: Tensor, b: Tensor, d: Tensor, s: Tensor) -> Tensor:
    """Trajectory consistency sampling."""
    x0 = p * x + q * m
    return b * x0 + d * m + s * torch.randn_like(x)
