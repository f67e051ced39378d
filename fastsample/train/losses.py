"""The losses of Improved DDPM (Nichol & Dhariwal 2021), for models that predict epsilon, v or x0."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.checks import not_a_tensor, one_of, usable_device
from fastsample.ops.checks import check_variance
from fastsample.ops.likelihood.coefficients import coefficients_of
from fastsample.ops.likelihood.reference import bits
from fastsample.ops.tracing import constant_when_traced, outside, traced
from fastsample.samplers import DDPM
from fastsample.schedule import Schedule, checked_schedule
from fastsample.tables import Table
from fastsample.zoo.unet import PREDICTIONS

LOSSES = ("simple", "vlb", "hybrid")
TrainedVariance = Literal["fixed_small", "fixed_large", "learned_range"]
VARIANCES: tuple[TrainedVariance, ...] = get_args(TrainedVariance)


# By how much an error of the second is one of the first. That of epsilon by 1 is one of v by 1 / alpha and of x0 by
# sigma / alpha; each quotient is written out, as with alpha = 0 two of them are infinite.
_SCALES: dict[tuple[str, str], Callable[[Tensor, Tensor], Tensor]] = {
    ("v", "epsilon"): lambda alpha, sigma: 1 / alpha,
    ("x0", "epsilon"): lambda alpha, sigma: sigma / alpha,
    ("epsilon", "v"): lambda alpha, sigma: alpha,
    ("x0", "v"): lambda alpha, sigma: sigma,
    ("epsilon", "x0"): lambda alpha, sigma: alpha / sigma,
    ("v", "x0"): lambda alpha, sigma: 1 / sigma,
}


class Terms(NamedTuple):
    """What a loss is made of, each (B,): the loss of every sample, the mean square error, and the variational term.

    mse is that of the target. vb is T L_t with the loss "vlb" and T / 1000 L_t with the others; "simple" does not
    minimise it.
    """

    loss: Tensor
    mse: Tensor
    vb: Tensor


class DiffusionLoss:
    """The loss of each sample of a batch, for models that predict epsilon, v or x0, with a variance or without.

    With x_t = alpha x_0 + sigma z, and L_t the variational bound's term at t in bits per dimension (ops.likelihood):

        simple   mean (target - the model's target)^2                    (Ho, Jain & Abbeel 2020)
        vlb      T L_t: its mean over uniform t is the bound but for the prior's term
        hybrid   simple + lambda T L_t, lambda = 0.001, where L_t sees the prediction without its gradient and so
                 trains the variance alone                                (Nichol & Dhariwal 2021)

    as improved-diffusion has them (RESCALED_KL and RESCALED_MSE; nothing is clipped). Everything is computed in
    float32, or in float64 where any of the tensors is. A t on the CPU is checked; one on a GPU is not read by the host.

    Args:
        schedule: the forward process, at least two timesteps.
        loss: "simple", "vlb" or "hybrid".
        prediction: what the model returns: "epsilon", "v" (alpha z - sigma x_0) or "x0".
        variance: "fixed_small", "fixed_large", or "learned_range" for models that return [prediction, v], 2C channels
            for C; "hybrid" needs it, and "simple", which would leave it untrained, refuses it. None takes
            "learned_range", for "simple" "fixed_small".
        target: what the mean square error is taken of, "epsilon", "v" or "x0"; None is the prediction. As errors of
            all three differ by factors, this is a weight of each timestep: that of v is 1 / alpha^2, and that of x0
            sigma^2 / alpha^2 times the error of epsilon. Outputs should then be float32: next to pure noise their
            rounding is multiplied too.

    Raises:
        ValueError: for a name that is none of these, a schedule with a single timestep, and later for a t that does
            not lie in [0, T) or an output of the wrong shape. TypeError: for what is no schedule.

    Example:
        >>> loss = DiffusionLoss(Schedule.cosine(1000), prediction="v", loss="simple")
        >>> x0, noise, t = torch.zeros(2, 3, 8), torch.ones(2, 3, 8), torch.tensor([10, 999])
        >>> xt = loss.q_sample(x0, t, noise)
        >>> loss(torch.zeros(2, 3, 8), x0, xt, t, noise).loss  # alpha^2
        tensor([9.9928e-01, 2.4288e-09])
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        loss: str = "hybrid",
        prediction: str = "epsilon",
        variance: str | None = None,
        target: str | None = None,
    ) -> None:
        if checked_schedule(schedule).T < 2:
            raise ValueError(f"the schedule needs at least 2 timesteps, got {schedule.T}")
        self.loss = one_of("loss", loss, LOSSES)
        self.prediction = one_of("prediction", prediction, PREDICTIONS)
        self.target = self.prediction if target is None else one_of("target", target, PREDICTIONS)
        self.variance = variance_of(loss, variance)
        self.schedule, self.T = schedule, schedule.T
        self._clipped_table = DDPM(schedule, variance=self.variance, prediction=self.prediction, clip=1.0).table
        self._table = self._clipped_table.replace(limit=math.inf)

    @property
    def learns_variance(self) -> bool:
        """Whether the model returns a second half, the variance's v."""
        return self.variance == "learned_range"

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; x0 and noise (B, ...), t int64 (B,)."""
        _check_batch(t, x0=x0, noise=noise)
        alpha, sigma = self._levels_at(t, x0, _common(x0, noise))
        return alpha * x0 + sigma * noise

    def vlb_term(self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, *, clip: bool = False) -> Tensor:
        """The term of the variational bound at t in bits per dimension, (B,).

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0 and -log p(x_0 | x_1) over 8-bit bins for t = 0.

        Args:
            output: [prediction, v], (B, 2C, ...), or the prediction alone, (B, C, ...), for a fixed variance.
            x0, xt: the data in [-1, 1] and the noisy ones, (B, C, ...).
            t: int64 (B,).
            clip: clamp the predicted x0 to [-1, 1], as is usual for evaluating a model but not for training it.
        """
        _check_batch(t, x0=x0, xt=xt)
        predicted, v = self._halves(output, xt)
        return self._bits(predicted, v, x0, xt, t, clip=clip)

    def __call__(self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor) -> Terms:
        """The terms of the loss. Shapes as in vlb_term; xt = q_sample(x0, t, noise)."""
        _check_batch(t, x0=x0, xt=xt, noise=noise)
        predicted, v = self._halves(output, xt)
        mse = self._mse(predicted, x0, t, noise)
        if self.loss == "vlb":
            vb = self._bits(predicted, v, x0, xt, t, clip=False) * self.T
            return Terms(vb, mse.detach(), vb)
        vb = self._bits(predicted.detach(), v, x0, xt, t, clip=False) * (self.T / 1000)
        return Terms(mse + vb if self.loss == "hybrid" else mse, mse, vb)

    def _mse(self, predicted: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        dtype = _common(x0, predicted, noise)
        alpha, sigma = self._levels_at(t, x0, dtype)
        true = {"epsilon": noise, "v": alpha * noise - sigma * x0, "x0": x0}[self.prediction]
        error = true.to(dtype) - predicted
        if self.target != self.prediction:
            error = error * _SCALES[self.target, self.prediction](alpha, sigma)
        return error.square().flatten(1).mean(1)

    def _halves(self, output: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        if self.learns_variance:
            check_variance(output, xt, name="output")
            predicted, v = output.chunk(2, dim=1)
            return predicted, v
        if output.shape != xt.shape:
            raise ValueError(
                f"output must have xt's shape {tuple(xt.shape)} for variance={self.variance!r}, "
                f"got {tuple(output.shape)}"
            )
        return output, torch.zeros_like(xt)

    def _bits(self, predicted: Tensor, v: Tensor, x0: Tensor, xt: Tensor, t: Tensor, *, clip: bool) -> Tensor:
        dtype = _common(x0, xt, predicted)
        coefficients = coefficients_of(self._clipped_table if clip else self._table, dtype, xt.device)
        # The table begins at the noisiest timestep, and a row that does not exist makes NaN of its sample.
        t = self._checked(t).to(xt.device, torch.int64)
        row = torch.where((t >= 0) & (t < self.T), self.T - 1 - t, self.T)
        # Without the choice of a backend: whichever is asked for elsewhere, only plain torch has gradients.
        return bits(x0.to(dtype), xt.to(dtype), predicted, v, coefficients, row)

    def _levels_at(self, t: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, to multiply x with."""
        t = self._checked(t).to(x.device, torch.int64)
        alpha, sigma = _levels(self._table, dtype, x.device)[:, t]
        return per_sample(alpha, x), per_sample(sigma, x)

    def _checked(self, t: Tensor) -> Tensor:
        """The same t. Raises ValueError where it is on the CPU and outside the schedule."""
        if not isinstance(t, Tensor):
            raise not_a_tensor("t", t)
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t must be a tensor of integers, got {t.dtype}")
        if t.is_cpu and not traced(t):
            outside_schedule = (t < 0) | (t >= self.T)
            if outside_schedule.any():
                raise ValueError(f"t must lie in [0, {self.T}), got {t[outside_schedule][0]}")
        return t


class HybridLoss(DiffusionLoss):
    """DiffusionLoss for [epsilon, v] models with loss="hybrid", called for (mse, vb) of each sample.

    Args:
        schedule: the forward process, at least two timesteps.
        device: taken for compatibility and not needed, since coefficients go where the images lie.

    Raises:
        ValueError: the schedule has a single timestep, the device cannot be used, or later a t does not lie in [0, T).
    """

    def __init__(self, schedule: Schedule, device: str | torch.device = "cpu") -> None:
        super().__init__(schedule)
        usable_device(device)

    def __call__(  # type: ignore[override]
        self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(mse, vb), each (B,); their sum is the loss to minimise. vb is vlb_term times T / 1000."""
        return super().__call__(output, x0, xt, t, noise)[1:]


def variance_of(loss: str, variance: str | None) -> TrainedVariance:
    """The variance of models that are trained with this loss, checked; None is the loss's own.

    Raises:
        ValueError: for one that the loss cannot train.
    """
    if variance is None:
        return "fixed_small" if loss == "simple" else "learned_range"
    chosen = one_of("variance", variance, VARIANCES)
    if loss == "hybrid" and variance != "learned_range":
        raise ValueError(f"variance={variance!r} leaves loss='hybrid' nothing to learn but 'simple': take that")
    if loss == "simple" and variance == "learned_range":
        raise ValueError("variance='learned_range' is not trained by loss='simple': take 'hybrid' or 'vlb'")
    return chosen


@constant_when_traced
def _levels(table: Table, dtype: torch.dtype, device: torch.device) -> Tensor:
    """alpha and sigma at every timestep, shape (2, T), made once per dtype and device."""

    def make(table: Table) -> Tensor:
        assert table.alpha is not None and table.sigma is not None
        with outside():
            return torch.from_numpy(np.stack((table.alpha[-2::-1], table.sigma[-2::-1]))).to(device, dtype)

    return table.derived(("levels", dtype, device), make)


def _check_batch(t: Tensor, **tensors: Tensor) -> None:
    """Raises unless all tensors have the shape of the first, (B, ...), and t is one for each sample or for all."""
    (first, wanted), *others = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise not_a_tensor(name, tensor)
    for name, tensor in others:
        if tensor.shape != wanted.shape:
            raise ValueError(f"{name} must have {first}'s shape {tuple(wanted.shape)}, got {tuple(tensor.shape)}")
    if wanted.ndim < 2 or not wanted.is_floating_point():
        raise ValueError(f"{first} must be floating, (B, ...), got {wanted.dtype} of shape {tuple(wanted.shape)}")
    if isinstance(t, Tensor) and t.shape not in ((), (1,), wanted.shape[:1]):
        raise ValueError(f"t must have shape (B,) = ({wanted.shape[0]},), got {tuple(t.shape)}")


def _common(*tensors: Tensor) -> torch.dtype:
    """What all of them are computed in."""
    dtype = torch.float32
    for one in tensors:
        dtype = torch.promote_types(dtype, one.dtype)
    return dtype
