"""Bits per dimension of given data: the whole variational bound of a model, on any respaced process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from fastsample.checks import check_floating, check_has_values
from fastsample.hints import hinting
from fastsample.loop.guidance import guidance_of
from fastsample.loop.noise_source import noise_source
from fastsample.loop.options import RunOptions
from fastsample.model import Model, Predictor, prediction_of, schedule_of, variance_of
from fastsample.ops.address import check_readable
from fastsample.ops.checks import check_like, check_state
from fastsample.ops.likelihood import likelihood, prior_bits
from fastsample.ops.likelihood.coefficients import coefficients_of, with_one_limit
from fastsample.ops.noise import fill
from fastsample.ops.noise.keys import Index, Seed, sample_keys
from fastsample.ops.step.box import box_of
from fastsample.ops.tracing import differentiable
from fastsample.samplers.ddpm import DDPM
from fastsample.samplers.kept import sampler_of
from fastsample.samplers.limits import Clip
from fastsample.schedule import Schedule
from fastsample.tables import Table
from fastsample.times.timesteps import Timesteps

BOUND = 3  # the stream of the bound's noise; those of samplers are 0 to 2

StepNoise = Callable[[int], Tensor] | Iterable[Tensor] | Generator
_Draw = Callable[[int], Tensor]


@dataclass(frozen=True, eq=False)
class BitsPerDimension:
    """What `nll` returns. Column k of the terms is the step from `timesteps[k]` on, the noisiest first.

    total_bpd = prior_bpd + the sum of vb over all steps, an upper bound of -log2 p(x0) / D, D the dimensions of x0.

    Attributes:
        total_bpd: the bound in bits per dimension, shape (B,), in x0's dtype like all that follow.
        prior_bpd: KL(q(x_T | x0) || N(0, 1)), shape (B,).
        vb: the terms, shape (B, steps): KL(q(x' | x, x0) || p(x' | x)), and in the last column -log2 p(x0 | x) of
            8-bit bins.
        x0_mse: mean square error of the model's x0 after clipping, shape (B, steps).
        mse: that of the noise which this x0 stands for, x0_mse alpha^2 / sigma^2, shape (B, steps).
        timesteps: what the model was given in each step, int64 of shape (steps,) on the CPU.
    """

    total_bpd: Tensor
    prior_bpd: Tensor
    vb: Tensor
    x0_mse: Tensor
    mse: Tensor
    timesteps: Tensor


@hinting()
def nll(
    model: Model,
    x0: Tensor,
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    timesteps: Timesteps = "respaced",
    variance: str | None = None,
    prediction: str | None = None,
    clip: Clip = 1.0,
    seed: Seed | None = None,
    index: Index = 0,
    noise: StepNoise | None = None,
    model_dtype: torch.dtype | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    cond: Mapping[str, Any] | None = None,
    cast_kwargs: bool = True,
    progress: bool = False,
) -> BitsPerDimension:
    """The variational bound on -log2 p(x0) in bits per dimension, as improved-diffusion's calc_bpd_loop computes it.

        total = KL(q(x_T | x0) || N(0, 1)) + sum over steps KL(q(x' | x, x0) || p(x' | x)) - log2 p(x0 | x_1)

    averaged over a sample's dimensions (Nichol & Dhariwal 2021). Each step draws fresh noise z, makes
    x = sqrt(abar) x0 + sqrt(1 - abar) z and calls the model once; the terms are those of fastsample.ops.likelihood. So
    the result is an estimate: its mean over noise is the bound. More steps give a tighter bound. Memory does not grow
    with steps but for the results.

    Args:
        model: as for `ddpm`. It may return twice the channels, (B, 2C, ...): the second half is a learned variance's v.
        x0: the data, shape (B, ...), float32 or float64, in [-1, 1]: the decoder sees 256 bins of width 2/255 there, of
            which the first and last are open. Images are x / 127.5 - 1. Data beyond it are refused, since an open bin
            would take them in for few bits.
        steps: model calls; None for all T timesteps of the schedule.
        schedule: default the model's own, else Schedule.linear(1000).
        timesteps: which ones to visit, all that DDPM takes: a spacing's name, "ddim50", "10,15,20", or the timesteps.
            The default goes from T - 1 to 0. A set that ends above 0 leaves the last level's noise to the decoder.
        variance: "fixed_small", "fixed_large", "learned" or "learned_range", see fastsample.DDPM; default
            `model.variance`, found as the schedule is, else "fixed_small".
        prediction: what the model predicts: "epsilon", "v" or "x0"; default `model.prediction`, found as the schedule
            is, else "epsilon".
        clip: x0 of the model is clamped to [-clip, clip]; None leaves it as it is. A pair (-c, c) is c.
        seed, index: as for samplers: z of step k is fastsample.ops.randn(x0.shape, seed=seed, index=index, step=k,
            stream=3), which no sampler draws. So a sample's noise does not depend on the batch that it is in.
        noise: z itself instead, of x0's shape, dtype and device: a function of the step k (0 = the noisiest); or an
            iterable of as many tensors as there are steps, the noisiest first, such as a generator or one tensor
            (steps, B, ...); or a torch.Generator.
        model_dtype, model_kwargs, cond, cast_kwargs: as in fastsample.Options. Class labels go into either mapping.
        progress: show a tqdm bar.

    Returns:
        A fastsample.BitsPerDimension.

    Raises:
        ValueError: for x0 outside [-1, 1] or NaN, a clip that thresholds dynamically or has other bounds, an alpha bar
            of 1, noise of another shape or device or of too few steps, both seed and noise, and x0 that requires
            gradients, which are not computed here (ops.likelihood has them); a model's output of a wrong shape or
            device, and one without the variance half that is asked for.
        TypeError: for x0 that is no tensor of these dtypes, and what fastsample.DDPM and the options refuse.

    Example:
        >>> from fastsample import Schedule
        >>> x0 = torch.zeros(2, 1, 8, 8)
        >>> bits = nll(lambda x, t: x, x0, schedule=Schedule.linear(), steps=10, seed=0)
        >>> bits.vb.shape, bool((bits.total_bpd > 0).all())
        (torch.Size([2, 10]), True)
    """
    predict = Predictor(model, model_dtype)
    _check_data(x0)
    sampler = sampler_of(
        DDPM,
        schedule_of(model, schedule),
        steps=steps,
        timesteps=timesteps,
        variance=variance_of(model, variance),
        prediction=prediction_of(model, prediction),
        clip=clip,
    )
    box_of(sampler.table, x0)  # raises where bounds do not fit
    table = with_one_limit(sampler.table)
    coefficients_of(table, x0.dtype, x0.device)  # which refuses some tables, and the model has not been called yet
    options = RunOptions(model_kwargs=model_kwargs, cond=cond, cast_kwargs=cast_kwargs)
    keywords = guidance_of(x0, options, predict.known_dtype).conditional
    data = x0.detach().resolve_neg().contiguous()
    draw = _drawn(data, seed, index) if noise is None else _given(noise, data, len(table))
    if noise is not None:
        if seed is not None:
            raise ValueError("give seed= or noise=, not both")
        sample_keys(0, index, len(data), data.device)  # raises for places that are none
    with torch.no_grad():
        return _bound(predict, keywords, data, table, draw, progress)


def _check_data(x0: Tensor) -> None:
    check_floating("x0", x0)
    try:
        check_state(x0)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("x must", "x0 must", 1)) from None
    check_readable("x0", x0)
    check_has_values("x0", x0)
    if differentiable(x0):
        raise ValueError("x0 requires gradients, which nll does not compute: give x0.detach()")
    low, high = (float(end) for end in x0.detach().aminmax())
    if not (low >= -1 and high <= 1):  # NaN too
        raise ValueError(
            f"x0 must lie in [-1, 1], where the decoder's 256 bins are, got {low:.6g} to {high:.6g}: images are "
            "x / 127.5 - 1"
        )


def _drawn(x0: Tensor, seed: Seed | None, index: Index) -> _Draw:
    """The noise of a seed; the tensor is written again in every step."""
    keys = sample_keys(seed, index, len(x0), x0.device)
    z = torch.empty(x0.shape, dtype=torch.float32, device=x0.device)

    def draw(k: int) -> Tensor:
        fill(z, keys, k, BOUND)
        return z

    return draw


def _given(noise: StepNoise, x0: Tensor, steps: int) -> _Draw:
    """The caller's own noise, each tensor looked at before it is used."""
    if callable(noise) or isinstance(noise, Generator):
        source = noise_source(noise, x0)
    elif isinstance(noise, Iterable):
        if isinstance(noise, Sized) and len(noise) != steps:
            raise ValueError(f"noise must hold a tensor for each of the {steps} steps, got {len(noise)}")
        source = _one_after_another(iter(noise), steps)
    else:
        raise TypeError(f"noise must be a function of the step, tensors or a torch.Generator, got {noise!r}")

    def draw(k: int) -> Tensor:
        z = source(k)
        check_like("noise", z, x0, dtype=x0.dtype)
        return z

    return draw


def _one_after_another(tensors: Iterator[Tensor], steps: int) -> _Draw:
    def draw(k: int) -> Tensor:
        try:
            return next(tensors)
        except StopIteration:
            raise ValueError(f"noise ended after {k} tensors, and there are {steps} steps") from None

    return draw


def _bound(
    predict: Predictor, keywords: Mapping[str, Any], x0: Tensor, table: Table, draw: _Draw, progress: bool
) -> BitsPerDimension:
    assert table.alpha is not None and table.sigma is not None
    levels = list(zip(table.alpha.tolist(), table.sigma.tolist(), strict=True))
    vb, x0_mse, mse = (x0.new_empty(len(x0), len(table)) for _ in range(3))
    x, scratch = torch.empty_like(x0), torch.empty_like(x0)
    for k in _shown(len(table), progress):
        alpha, sigma = levels[k]
        torch.mul(x0, alpha, out=x).add_(draw(k), alpha=sigma)
        time = torch.full((len(x0),), table.times[k], dtype=torch.int64, device=x0.device)
        # Not x itself: a model that gives its argument other memory, `x.data = ...`, must not move it.
        m = predict(x.detach() if x.dtype == predict.dtype else x.to(predict.dtype), time, keywords)
        vb[:, k] = likelihood(x0, x, m, table, k)
        x0_mse[:, k] = _error_of_x0(x0, x, m, table, k, scratch)
        torch.mul(x0_mse[:, k], (alpha / sigma) ** 2, out=mse[:, k])
    prior = prior_bits(x0, table)
    timesteps = torch.from_numpy(table.t.copy())
    return BitsPerDimension(vb.sum(dim=1) + prior, prior, vb, x0_mse, mse, timesteps)


def _error_of_x0(x0: Tensor, x: Tensor, m: Tensor, table: Table, k: int, scratch: Tensor) -> Tensor:
    """Mean square of x0 - limit(p x + q m) per sample."""
    m = m if m.shape == x.shape else m[:, : x.shape[1]]
    limit = float(table.limit[k])
    torch.mul(x, float(table.p[k]), out=scratch).add_(m.to(x.dtype), alpha=float(table.q[k]))
    return scratch.clamp_(-limit, limit).sub_(x0).square_().reshape(len(x0), -1).mean(dim=1)


def _shown(steps: int, progress: bool) -> Iterable[int]:
    if not progress:
        return range(steps)
    from tqdm.auto import tqdm

    return tqdm(range(steps))
