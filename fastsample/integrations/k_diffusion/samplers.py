"""The functions, with the names, arguments and defaults of k-diffusion; lcm, ddim and ipndm are ComfyUI's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastsample.checks import integer, one_of
from fastsample.hints import hinting
from fastsample.integrations.k_diffusion import tables
from fastsample.integrations.k_diffusion.call import Call, Callback, Denoiser, NoiseSampler, checked_churn, not_negative
from fastsample.integrations.k_diffusion.run import run
from fastsample.ops.noise.keys import Index, Seed

# What only some of them take.
_ELSEWHERE = {
    **dict.fromkeys(("eta", "noise_sampler"), "sample_euler_ancestral and others that add noise"),
    **dict.fromkeys(("s_churn", "s_tmin", "s_tmax"), "sample_euler and sample_heun"),
    "s_noise": "sample_euler and others that add noise",
    "solver_type": "sample_dpmpp_2m_sde",
    "max_order": "sample_ipndm",
    **dict.fromkeys(("seed", "index"), "sample_euler and others that add noise"),
}


@hinting(**_ELSEWHERE)
@torch.no_grad()
def sample_euler(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    seed: Seed | None = None,
    index: Index = 0,
) -> Tensor:
    """Euler's method (Karras et al. 2022, algorithm 2 without its second half).

        x' = x + (sigma' - sigma) (x - x0) / sigma

    Args:
        model: gives x0 of x0 + sigma z: called as model(x, sigma, **extra_args) with sigma of shape (B,), both of x's
            dtype, it returns a floating-point tensor of x's shape.
        x: the state at sigmas[0], (B, ...), of any floating dtype and on any device. It is not changed. float32 and
            half precision are computed in float32.
        sigmas: the levels of the N steps and the last one, (N + 1,), decreasing, the last at least 0. They are read
            once. Of a single level x is returned.
        extra_args: the model's keywords.
        callback: called after the model in every step, before x changes, with a dict: x, i (the step), sigma
            (sigmas[i]), sigma_hat (the level with churn) and denoised. It may keep these, and may change x in place.
        disable: whether to show no progress bar; None shows one on a terminal.
        s_churn, s_tmin, s_tmax, s_noise: before a step from a sigma between s_tmin and s_tmax noise is added up to
            sigma (1 + min(s_churn / N, sqrt(2) - 1)), s_noise times as much as that level asks for.
        seed, index: noise as every sampler here draws it, the same on all devices, see fastsample.Options. Without a
            seed it is torch.randn_like(x).

    Returns:
        The state at sigmas[-1], of x's shape and dtype.

    Raises:
        ValueError: for sigmas that do not decrease, are negative or not finite, another shape of sigmas, a negative
            option, and a model's output of another shape or device. TypeError: for arguments of another type.

    Example:
        >>> sigmas = torch.tensor([80.0, 10.0, 1.0, 0.0])
        >>> sample_euler(lambda x, sigma: 0.5 * x, torch.ones(2, 3), sigmas, disable=True).shape
        torch.Size([2, 3])
    """
    churn = checked_churn(s_churn, s_tmin, s_tmax, s_noise)
    call = Call(model, x, sigmas, extra_args, callback, disable, seed=seed, index=index)
    return run(call, tables.euler, churn)


@hinting(**_ELSEWHERE)
@torch.no_grad()
def sample_euler_ancestral(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seed: Seed | None = None,
    index: Index = 0,
) -> Tensor:
    """Euler's method down to less noise than the next level has, which is made up for by new noise.

        up = min(sigma', eta sigma' sqrt(1 - sigma'^2 / sigma^2)), down = sqrt(sigma'^2 - up^2)
        x' = x + (down - sigma) (x - x0) / sigma + s_noise up z

    Args:
        model, x, sigmas, extra_args, callback, disable: see sample_euler.
        eta: at least 0; 0 is Euler's method.
        s_noise: what the noise is multiplied by, at least 0.
        noise_sampler: z = noise_sampler(sigma, sigma_next), of x's shape and device: called in every step that does not
            end at 0, after the callback, with the sigmas' own elements.
        seed, index: instead of noise_sampler, see sample_euler; without either z is torch.randn_like(x).

    Raises:
        ValueError, TypeError: as sample_euler, and where both noise_sampler and seed are given.

    Example:
        >>> sigmas = torch.tensor([80.0, 10.0, 1.0, 0.0])
        >>> sample_euler_ancestral(lambda x, sigma: 0.5 * x, torch.ones(2, 3), sigmas, disable=True, seed=0).shape
        torch.Size([2, 3])
    """
    eta, s_noise = not_negative("eta", eta), not_negative("s_noise", s_noise)
    call = Call(model, x, sigmas, extra_args, callback, disable, noise_sampler, seed, index)
    return run(call, tables.ancestral, eta, s_noise, True)


@hinting(**_ELSEWHERE)
@torch.no_grad()
def sample_heun(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    seed: Seed | None = None,
    index: Index = 0,
) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 2): two model calls in every step that does not end at 0.

        x2 = x + (sigma' - sigma) d,  d = (x - x0) / sigma
        x' = x + (sigma' - sigma) (d + (x2 - x0') / sigma') / 2,  x0' that of the model at x2

    Args:
        model, x, sigmas, extra_args, callback, disable, s_churn, s_tmin, s_tmax, s_noise, seed, index: see
            sample_euler. The callback is called once a step, after its first model call.

    Raises:
        ValueError, TypeError: as sample_euler.

    Example:
        >>> sigmas = torch.tensor([80.0, 10.0, 1.0, 0.0])
        >>> sample_heun(lambda x, sigma: 0.5 * x, torch.ones(2, 3), sigmas, disable=True).shape
        torch.Size([2, 3])
    """
    churn = checked_churn(s_churn, s_tmin, s_tmax, s_noise)
    call = Call(model, x, sigmas, extra_args, callback, disable, seed=seed, index=index)
    return run(call, tables.heun, churn)


@hinting(**_ELSEWHERE)
@torch.no_grad()
def sample_dpmpp_2m(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++ (2M) (Lu et al. 2022): of second order, at one model call a step.

        x' = sigma'/sigma x + E (x0 + w / (2 w1) (x0 - h1)),  E = 1 - e^-w,  w = log(sigma / sigma')

    h1 and w1 are x0 and w of the last step; the first step and one that ends at 0 are without them.

    Args:
        model, x, sigmas, extra_args, callback, disable: see sample_euler.

    Raises:
        ValueError, TypeError: as sample_euler.

    Example:
        >>> sigmas = torch.tensor([80.0, 10.0, 1.0, 0.0])
        >>> sample_dpmpp_2m(lambda x, sigma: 0.5 * x, torch.ones(2, 3), sigmas, disable=True).shape
        torch.Size([2, 3])
    """
    return run(Call(model, x, sigmas, extra_args, callback, disable), tables.dpmpp_2m, 0.0, 1.0, "midpoint")


@hinting(**_ELSEWHERE)
@torch.no_grad()
def sample_dpmpp_2m_sde(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
    *,
    seed: Seed | None = None,
    index: Index = 0,
) -> Tensor:
    """DPM-Solver++ (2M) of the reverse SDE (Lu et al. 2022): new noise in every step that does not end at 0.

        x' = sigma'/sigma e^-(eta w) x + E x0 + C w / w1 (x0 - h1) + s_noise sigma' sqrt(1 - e^-2(eta w)) z
        E = 1 - e^-(1 + eta) w,  C = E / 2 ("midpoint") or 1 - E / ((1 + eta) w) ("heun")

    with the letters of sample_dpmpp_2m, which eta = 0 and "midpoint" are.

    Args:
        model, x, sigmas, extra_args, callback, disable: see sample_euler.
        eta, s_noise, seed, index: see sample_euler_ancestral.
        noise_sampler: see sample_euler_ancestral; not called where eta is 0. k-diffusion's default here is its
            BrownianTreeNoiseSampler, which can be given; ours is torch.randn_like(x), of the same distribution.
        solver_type: "midpoint" or "heun".

    Raises:
        ValueError, TypeError: as sample_euler_ancestral, and for another solver_type.

    Example:
        >>> sigmas = torch.tensor([80.0, 10.0, 1.0, 0.0])
        >>> sample_dpmpp_2m_sde(lambda x, sigma: 0.5 * x, torch.ones(2, 3), sigmas, disable=True, seed=0).shape
        torch.Size([2, 3])
    """
    eta, s_noise = not_negative("eta", eta), not_negative("s_noise", s_noise)
    solver_type = one_of("solver_type", solver_type, ("midpoint", "heun"))
    call = Call(model, x, sigmas, extra_args, callback, disable, noise_sampler, seed, index)
    return run(call, tables.dpmpp_2m, eta, s_noise, solver_type)


@hinting(**_ELSEWHERE)
@torch.no_grad()
def sample_lcm(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    *,
    seed: Seed | None = None,
    index: Index = 0,
) -> Tensor:
    """Latent consistency models (Luo et al. 2023): each step goes to clean data and back to the next level.

        x' = x0 + sigma' z

    Args:
        model, x, sigmas, extra_args, callback, disable: see sample_euler.
        noise_sampler, seed, index: see sample_euler_ancestral.

    Raises:
        ValueError, TypeError: as sample_euler_ancestral.

    Example:
        >>> sigmas = torch.tensor([80.0, 10.0, 1.0, 0.0])
        >>> sample_lcm(lambda x, sigma: 0.5 * x, torch.ones(2, 3), sigmas, disable=True, seed=0).shape
        torch.Size([2, 3])
    """
    return run(Call(model, x, sigmas, extra_args, callback, disable, noise_sampler, seed, index), tables.lcm)


@hinting(**_ELSEWHERE)
@torch.no_grad()
def sample_ddim(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seed: Seed | None = None,
    index: Index = 0,
) -> Tensor:
    """DDIM (Song et al. 2021) in sigmas, which makes it sample_euler_ancestral with another default of eta.

    Args:
        model, x, sigmas, extra_args, callback, disable: see sample_euler.
        eta: DDIM's own; 0 is Euler's method, as ComfyUI's "ddim" is, and 1 DDPM's variance.
        s_noise, seed, index: see sample_euler_ancestral.
        noise_sampler: see sample_euler_ancestral; not called where eta is 0.

    Raises:
        ValueError, TypeError: as sample_euler_ancestral.

    Example:
        >>> sigmas = torch.tensor([80.0, 10.0, 1.0, 0.0])
        >>> sample_ddim(lambda x, sigma: 0.5 * x, torch.ones(2, 3), sigmas, disable=True).shape
        torch.Size([2, 3])
    """
    eta, s_noise = not_negative("eta", eta), not_negative("s_noise", s_noise)
    call = Call(model, x, sigmas, extra_args, callback, disable, noise_sampler, seed, index)
    return run(call, tables.ancestral, eta, s_noise, False)


@hinting(**_ELSEWHERE)
@torch.no_grad()
def sample_ipndm(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 4,
) -> Tensor:
    """iPNDM (Zhang & Chen 2022): Adams-Bashforth on the slopes d = (x - x0) / sigma, of orders 1, 2, ... max_order.

        x' = x + (sigma' - sigma) (55 d - 59 h1 + 37 h2 - 9 h3) / 24

    h1, h2 and h3 are d of the last steps; fastsample.ipndm has the lower orders. A step that ends at 0 is x' = x0.

    Args:
        model, x, sigmas, extra_args, callback, disable: see sample_euler.
        max_order: 1 to 4.

    Raises:
        ValueError, TypeError: as sample_euler, and for another order.

    Example:
        >>> sigmas = torch.tensor([80.0, 10.0, 1.0, 0.0])
        >>> sample_ipndm(lambda x, sigma: 0.5 * x, torch.ones(2, 3), sigmas, disable=True).shape
        torch.Size([2, 3])
    """
    max_order = integer("max_order", max_order, 1, 4)
    return run(Call(model, x, sigmas, extra_args, callback, disable), tables.ipndm, max_order)
