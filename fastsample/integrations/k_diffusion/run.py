"""The loop: the model, the callback, and the row of a table, one pass over memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import trange

from fastsample.integrations.k_diffusion.call import Call, check_like_x, checked_sigmas
from fastsample.integrations.k_diffusion.tables import Method
from fastsample.loop.model_input import ModelInput
from fastsample.loop.turns import plans_in_turn
from fastsample.ops.backend import choose
from fastsample.ops.memory import fresh, ordinary_tensors
from fastsample.ops.noise.keys import sample_keys
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan
from fastsample.versions import version_of


def run(call: Call, method: Callable[..., Method], *options: object) -> Tensor:
    """The sample that a method, made for the caller's sigmas and these options, comes to."""
    sigmas = checked_sigmas(call)
    x, keys = call.x.detach(), None
    if call.seed is not None:
        keys = sample_keys(call.seed, call.index, len(x), x.device)
    return x if len(sigmas) == 1 else _Run(call._replace(x=x), method(sigmas, *options), keys).sample()


class _Run:
    """One run. The state is float32, or float64 as x is, and its rows step over it in place.

    Models and callbacks may keep what they are given, and may change it: each row shows them a copy, in x's dtype.
    """

    def __init__(self, call: Call, method: Method, keys: Tensor | None) -> None:
        self._call, self._method, self._keys, table = call, method, keys, method.table
        self._keywords = {} if call.extra_args is None else dict(call.extra_args)
        x = call.x
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        backend = choose(None, x.device, native=dtype == torch.float32)
        with ordinary_tensors():
            place = ModelInput(x.shape, dtype, x.device, dtype, scaled=False, guided=False)
            self._state = place.state.copy_(x)
            entries = [fresh(x.shape, dtype, x.device) for _ in range(table.history)]
            self._plans = plans_in_turn([place], entries, table, backend, writes_input=False, keys=keys)
            self._churns = None
            if method.churn is not None:
                self._churns = StepPlan(Operands(self._state, method.churn, keys, out=self._state), backend)

    def sample(self) -> Tensor:
        method, steps = self._method, len(self._method.first_rows)
        ends = (*method.first_rows[1:], len(method.table))
        for i in trange(steps, disable=self._call.disable):
            first = method.first_rows[i]
            self._churn(first, i)
            self._row(first, i, seen=self._call.callback is not None)
            for row in range(first + 1, ends[i]):
                self._row(row, i, seen=False)
        return self._state.to(self._call.x.dtype)

    def _churn(self, row: int, i: int) -> None:
        if self._churns is not None and self._method.churn.stochastic[row]:  # type: ignore[union-attr]  # with plans
            self._churns(self._state, row, self._noise(i))

    def _row(self, row: int, i: int, *, seen: bool) -> None:
        x, model, sigma = self._shown(), self._call.model, self._method.sigma[row]
        version = version_of(x)
        denoised = model(x, x.new_full((len(x),), sigma), **self._keywords)
        check_like_x("model", denoised, self._state)
        if version_of(x) != version:
            self._state.copy_(x)
        if seen and self._method.slope_first:
            before, version = x.clone(), version_of(x)
            self._step(row, i, denoised)
            self._show(x, i, denoised)
            if version_of(x) != version:
                self._state.add_(x.to(self._state.dtype) - before.to(self._state.dtype))
            return
        if seen:
            version = version_of(x)
            self._show(x, i, denoised)
            if version_of(x) != version:
                self._state.copy_(x)
        self._step(row, i, denoised)

    def _shown(self) -> Tensor:
        with ordinary_tensors():
            return fresh(self._state.shape, self._call.x.dtype, self._state.device).copy_(self._state)

    def _show(self, x: Tensor, i: int, denoised: Tensor) -> None:
        sigma, row = self._call.sigmas[i], self._method.first_rows[i]
        churned = self._method.churn is not None and self._method.churn.stochastic[row]
        sigma_hat = torch.full_like(sigma, self._method.sigma[row]) if churned else sigma
        self._call.callback(  # type: ignore[misc]  # there is one where rows are seen
            {"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma_hat, "denoised": denoised}
        )

    def _step(self, row: int, i: int, denoised: Tensor) -> None:
        z = self._noise(i) if self._method.draws[row] else None
        plan = self._plans[row % len(self._plans)]
        plan(denoised, row, z, self._method.table.keeps_entry[row], False)

    def _noise(self, i: int) -> Tensor | None:
        """z of a step; None where the pass draws it from keys."""
        call = self._call
        if call.noise_sampler is not None:
            z = call.noise_sampler(call.sigmas[i], call.sigmas[i + 1])
            check_like_x("noise_sampler", z, self._state)
        elif self._keys is None:
            z = torch.randn_like(call.x)
        else:
            return None
        return z.to(self._state.dtype)
