"""What a caller gives, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsample.checks import check_floating, checked_shape, not_a_tensor, real, real_array
from fastsample.hints import check_takes
from fastsample.integrations.k_diffusion.tables import Churn, Sigmas
from fastsample.ops.noise.keys import Index, Seed

Denoiser = Callable[..., Tensor]  # denoised = model(x, sigma, **extra_args)
Callback = Callable[[dict[str, Any]], object]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]  # z = noise_sampler(sigma, sigma_next)


class Call(NamedTuple):
    """The arguments that all methods share, as given; see sample_euler and sample_euler_ancestral."""

    model: Denoiser
    x: Tensor
    sigmas: Tensor
    extra_args: Mapping[str, Any] | None
    callback: Callback | None
    disable: bool | None
    noise_sampler: NoiseSampler | None = None
    seed: Seed | None = None
    index: Index = 0  # type: ignore[assignment]  # a tuple's method of that name is not missed


def checked_sigmas(call: Call) -> Sigmas:
    """The sigmas as numbers, read once, when all arguments have been checked; seeds are left to whoever hashes them.

    Raises:
        TypeError, ValueError: naming the argument that cannot work.
    """
    if not callable(call.model):
        raise TypeError(f"model must be callable as model(x, sigma, **extra_args), got {type(call.model).__name__}")
    check_floating("x", call.x)
    checked_shape("x", call.x.shape)
    if not isinstance(call.extra_args, Mapping | None):
        raise TypeError(f"extra_args must be a mapping of the model's keywords, got {type(call.extra_args).__name__}")
    _check_function("callback", call.callback, "callback(info)", "a dict of x, i, sigma, sigma_hat and denoised")
    _check_function("noise_sampler", call.noise_sampler, "noise_sampler(sigma, sigma_next)", "the levels of a step")
    if call.noise_sampler is not None and call.seed is not None:
        raise ValueError("noise comes from noise_sampler or from seed: give one of them")
    if call.seed is None and not (isinstance(call.index, int) and call.index == 0):
        raise ValueError("index is a place in the set that seed names: give seed too")
    sigmas = _decreasing(call.sigmas)
    if sigmas[0] > (most := min(torch.finfo(call.x.dtype).max, torch.finfo(torch.float32).max)):
        raise ValueError(f"sigmas must be at most {most:g} for an x of {call.x.dtype}, got {sigmas[0]:g}")
    return sigmas


def checked_churn(s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> Churn:
    """These as one. Raises TypeError or ValueError for what is negative or no number."""
    churn = Churn(
        not_negative("s_churn", s_churn),
        real("s_tmin", s_tmin),
        real("s_tmax", s_tmax),
        not_negative("s_noise", s_noise),
    )
    if math.isnan(churn.low) or math.isnan(churn.high):
        raise ValueError(f"s_tmin and s_tmax must not be NaN, got {s_tmin} and {s_tmax}")
    return churn


def not_negative(name: str, value: Any) -> float:
    """The value as a float. Raises TypeError for what is no number, ValueError unless 0 <= value < infinity."""
    number = real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return number


def check_like_x(source: str, tensor: object, x: Tensor) -> None:
    """Raises unless what a caller's function has returned is a floating-point tensor of x's shape and device."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{source} must return a floating-point tensor of x's shape {tuple(x.shape)}, got {got}")
    if tensor.shape != x.shape:
        raise ValueError(f"{source} must return a tensor of x's shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{source} must return a tensor on {x.device} as x is, got one on {tensor.device}")


def _check_function(name: str, function: object, call: str, given: str) -> None:
    if function is None:
        return
    if not callable(function):
        raise TypeError(f"{name} must be callable as {call}, got {type(function).__name__}")
    check_takes(name, function, call, given)


def _decreasing(sigmas: Tensor) -> Sigmas:
    if not isinstance(sigmas, Tensor):
        raise not_a_tensor("sigmas", sigmas)
    if sigmas.ndim != 1 or len(sigmas) == 0:
        raise ValueError(f"sigmas must be a vector of the steps' levels and the last, got shape {tuple(sigmas.shape)}")
    levels = tuple(real_array("sigmas", sigmas).astype(float).tolist())
    for i, level in enumerate(levels):
        if not 0 <= level < math.inf:
            raise ValueError(f"sigmas must be finite and at least 0, got {level} at {i}")
        if i and not level < levels[i - 1]:
            raise ValueError(f"sigmas must decrease, got {levels[i - 1]} and then {level} at {i}")
    return levels
