"""Between two samples, by way of the noise they come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from fastsample.broadcast import per_sample
from fastsample.checks import check_has_values
from fastsample.loop.options import Decode, Decoded, Undecoded
from fastsample.model import Model, prediction_of, schedule_of
from fastsample.samplers.ddim import DDIM
from fastsample.samplers.hints import not_a_sampler
from fastsample.samplers.sampler import Sampler


def slerp(a: Tensor, b: Tensor, weight: float | Sequence[float] | Tensor) -> Tensor:
    """Spherical interpolation from a (weight 0) to b (weight 1), per sample over all but the first axis.

        sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b,   theta the angle between a and b

    It keeps the length that Gaussian noise has in many dimensions, which a straight line would shorten. Samples whose
    directions agree (or oppose) to 1e-6 are joined by the straight line.

    Args:
        a, b: of one shape (B, ...) and dtype; B may be 1 where there are n weights.
        weight: a number, or n of them, one per sample.

    Returns:
        Shape (B, ...), or (n, ...) for B = 1.

    Raises:
        ValueError: for shapes that do not fit, and devices that differ. TypeError: where a or b is not a floating-point
            tensor, the dtypes differ, or the weight is no number.

    Example:
        >>> slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), [0.0, 0.5])
        tensor([[1.0000, 0.0000],
                [0.7071, 0.7071]])
    """
    for name, tensor in (("a", a), ("b", b)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    if a.shape != b.shape or a.ndim == 0:
        raise ValueError(f"a and b must have one shape (B, ...), got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype:
        raise TypeError(f"a and b must have one dtype, got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"a and b must lie on one device, got {a.device} and {b.device}")
    if isinstance(weight, Tensor) and not a.is_meta:
        check_has_values("weight", weight)
    try:
        w = torch.as_tensor(weight, dtype=torch.float64, device=a.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"weight must be a number or one per sample, got {weight!r}") from None
    if w.ndim > 1 or (w.ndim == 1 and len(a) not in (1, len(w))):
        raise ValueError(f"weight must be a number or {len(a)} of them, one per sample; got shape {tuple(w.shape)}")
    # In float64: near 1 the cosine tells a small angle with half its digits only.
    first, second = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=1)
    theta = cosine.clamp(-1, 1).acos()
    straight = theta.sin() < 1e-6
    sine = torch.where(straight, 1.0, theta.sin())
    of_a = torch.where(straight, 1 - w, ((1 - w) * theta).sin() / sine)
    of_b = torch.where(straight, w, (w * theta).sin() / sine)
    return per_sample(of_a.to(a.dtype), a) * a + per_sample(of_b.to(a.dtype), b) * b


def interpolate(
    model: Model,
    a: Tensor,
    b: Tensor,
    n: int,
    *,
    sampler: Sampler | None = None,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """n samples on the way from the one that comes from noise a to the one from noise b (Song, Meng & Ermon 2020).

    The noise is interpolated by `slerp` at the weights 0, 1 / (n - 1), ..., 1. `ddim_invert` finds a sample's noise.

    Args:
        model: as for `ddim`.
        a, b: noise of one sample each, with its batch axis: (1, C, H, W), or other axes behind the first.
        n: an int, at least 2. They are sampled in one batch.
        sampler: any; default DDIM of 50 steps for `model.schedule` and `model.prediction`. A flow takes
            Euler(prediction="flow"), and its samples' noise comes from `euler_invert`. Only where it adds no noise do
            samples change smoothly: give the rest `seed=[s] * n`, the same noise for all.
        decode, **options: the arguments of every sampler, documented in fastsample.Options.

    Returns:
        (n, C, H, W), or what `decode` made of it.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.

    Example:
        >>> noise = torch.randn(2, 3, 8, 8)
        >>> interpolate(lambda x, t: 0.1 * x, noise[:1], noise[1:], 5).shape
        torch.Size([5, 3, 8, 8])
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 2:
        raise ValueError(f"n must be an int of at least 2, got {n!r}")
    for name, noise in (("a", a), ("b", b)):
        if isinstance(noise, Tensor) and noise.shape[:1] != (1,):
            raise ValueError(
                f"{name} must be one sample with its batch axis, (1, ...), got {tuple(noise.shape)}: give {name}[None] "
                "for one without that axis, an interpolate call of its own for each of several"
            )
    if not isinstance(sampler, Sampler | None):
        raise not_a_sampler(sampler)
    weights = torch.linspace(0, 1, int(n), dtype=torch.float64, device="cpu")
    between = slerp(a, b, weights)
    if sampler is None:
        sampler = DDIM(schedule_of(model, None), steps=50, prediction=prediction_of(model, None))
    return sampler(model, between, decode=decode, **options)
