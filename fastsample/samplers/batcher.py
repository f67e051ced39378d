"""Continuous batching: requests join and leave a batch of fixed size between model calls."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample.model import Model, Predictor
from fastsample.ops.backend import choose, fresh
from fastsample.ops.keys import sample_keys
from fastsample.ops.noise import INITIAL, fill
from fastsample.samplers.guidance import Guidance, guidance_of
from fastsample.samplers.inputs import ModelInput
from fastsample.samplers.limits import check_number
from fastsample.samplers.loop import plans_in_turn
from fastsample.samplers.sampler import Sampler
from fastsample.samplers.start import warn_of_far_noise
from fastsample.tables import Table


class Request:
    """A sample that a Batcher is to make: what `Batcher.submit` returns."""

    def __init__(self, batcher: Batcher, key: Tensor, cond: Mapping[str, Tensor]) -> None:
        self._batcher, self._key, self._cond = batcher, key, cond
        self._sample: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether the sample is finished."""
        return self._sample is not None

    def result(self) -> Tensor:
        """The sample, float32 of the shape that was submitted; the batcher runs until it is finished."""
        while self._sample is None:
            self._batcher.step()
        return self._sample


class Batcher:
    """Samples requests that come and go in one batch of fixed size, each of them at a step of its own.

    A request that arrives while others are half-way joins the next model call, and one that is finished makes room: no
    one waits for a whole batch. Every model call has exactly `batch` samples; places that nobody has hold zeros.

    A request's noise and the arithmetic of its steps depend on its seed and index alone. So its result has the same
    bits in any company, where the model's output for a sample does not depend on its place in the batch, and those of
    `sampler(model, (1, *shape), seed=seed, index=index)` where it does not depend on the size of the batch either.
    (Matrix products may round differently in batches of another size, and some, between two threads, in another place.)

    Not for several threads at once.

    Args:
        model: called as model(x, t, **keywords), x of shape (batch, *shape) (under guidance twice the batch, the first
            half unconditional) and t with a time per sample. Otherwise as for `ddim`.
        sampler: any that starts from noise and has no correct_x0.
        batch: the number of places.
        guidance: w of classifier-free guidance, the same for all requests; None or 1 calls the conditional half only.
        uncond: with guidance, the keywords of the unconditional half, as those of `submit`.
        guidance_rescale, model_dtype, backend: as in fastsample.Options.
        model_kwargs: passed to every model call; under guidance tensors whose first axis is `batch` are doubled.

    Raises:
        ValueError, TypeError: for arguments that cannot work.

    Example:
        >>> from fastsample import DDIM, Schedule
        >>> batcher = Batcher(lambda x, t: 0.1 * x, DDIM(Schedule.linear(), steps=10), batch=4)
        >>> first = batcher.submit((3, 8, 8), seed=0)
        >>> batcher.step()
        1
        >>> second = batcher.submit((3, 8, 8), seed=0, index=1)
        >>> second.result().shape, first.done
        (torch.Size([3, 8, 8]), True)
    """

    def __init__(
        self,
        model: Model,
        sampler: Sampler,
        *,
        batch: int,
        guidance: float | None = None,
        uncond: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        model_kwargs: Mapping[str, Any] | None = None,
        model_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be one of fastsample's, such as fastsample.DDIM, got {sampler!r}")
        if sampler.correct_x0 is not None:
            raise ValueError("a Batcher takes no sampler with correct_x0: call it on its own")
        sigma = sampler.table.sigma
        if sigma is not None and sigma[0] < sigma[-1]:
            raise ValueError(f"a Batcher starts from noise, {type(sampler).__name__} from clean samples")
        warn_of_far_noise(sampler.table)
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch must be an int of at least 1, got {batch!r}")
        if guidance is not None:
            check_number("guidance", guidance)
        self._predict = Predictor(model, model_dtype)
        device = self._predict.device or torch.device("cpu")
        self._guide = functools.partial(
            guidance_of, guidance=guidance, rescale=guidance_rescale, interval=None, model_kwargs=model_kwargs
        )
        self._guide(torch.empty(batch, device=device), cond=uncond, uncond=uncond)  # refuses what cannot work
        self._table, self._uncond = _with_idle_row(sampler.table), dict(uncond or {})
        self._device, self._backend = device, choose(backend, device, native=True)
        self._waiting: deque[Request] = deque()
        self._running: list[Request | None] = [None] * batch
        self._places: _Places | None = None

    def submit(self, shape: Sequence[int], seed: int | None = None, index: int = 0, **cond: Any) -> Request:
        """Queues one sample.

        Args:
            shape: of the sample alone, without a batch axis; the same for all requests of a Batcher.
            seed, index: the sample is the one at place `index` of the set that `seed` names, as in
                fastsample.Options; default a fresh seed.
            **cond: the model's keywords for this sample: tensors without a batch axis, or numbers. They are stacked to
                (batch, ...). The first request decides on names, shapes and dtypes. Tensors of a model's GPU join
                without making the host wait for it.

        Raises:
            ValueError, TypeError: for an empty shape, a seed or index that is not an int, and a shape or keywords
                unlike those of the first request (or of `uncond`). Nothing changes then.
        """
        size = _sample_shape(shape)
        key = sample_keys(seed, index, 1, self._device)
        places = self._places
        if places is not None:
            if size != places.shape:
                raise ValueError(f"shape must be that of the first request, {tuple(places.shape)}, got {tuple(size)}")
            if unlike := sorted(set(cond) ^ set(places.cond)):
                raise ValueError(f"every request must give the keywords of the first; only one has {', '.join(unlike)}")
        like = {} if places is None else {name: batched[0] for name, batched in places.cond.items()}
        values = {name: _of_one_sample(name, value, self._device, like.get(name)) for name, value in cond.items()}
        if places is None:
            self._places = self._make_places(size, values)
        request = Request(self, key, values)
        self._waiting.append(request)
        return request

    @torch.no_grad()
    def step(self) -> int:
        """Lets waiting requests in, calls the model once, and takes everyone one row further.

        Where the model raises, every request stays where it was.

        Returns:
            How many requests are not finished, so that `while batcher.step(): ...` runs until all are. Where there are
            none the model is not called.
        """
        places = self._places
        if places is None:
            return 0
        for i, request in enumerate(self._running):
            if request is None and self._waiting:
                self._running[i] = entering = self._waiting.popleft()
                places.enter(i, entering._key, entering._cond)
                entering._cond = {}
        if not any(self._running):
            return 0
        places.advance()
        for i in places.idle():
            if (finished := self._running[i]) is not None:
                finished._sample = places.leave(i)
                self._running[i] = None
        return len(self._waiting) + sum(request is not None for request in self._running)

    def _make_places(self, shape: torch.Size, cond: Mapping[str, Tensor]) -> _Places:
        uncond = {
            name: _of_one_sample(f"uncond's {name}", value, self._device, cond.get(name))
            for name, value in self._uncond.items()
        }
        return _Places(
            shape,
            cond,
            uncond,
            batch=len(self._running),
            predict=self._predict,
            table=self._table,
            guide=self._guide,
            device=self._device,
            backend=self._backend,
        )


class _Places:
    """The buffers of a batch, and the model call that takes every sample in it to its next row."""

    def __init__(
        self,
        shape: torch.Size,
        cond: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor],
        *,
        batch: int,
        predict: Predictor,
        table: Table,
        guide: Callable[..., Guidance],
        device: torch.device,
        backend: str,
    ) -> None:
        def batched(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            # Also where nobody is, the model is given what it can work with.
            return {name: value.expand(batch, *value.shape).clone() for name, value in values.items()}

        self.shape, self._predict, self._table, self._backend = shape, predict, table, backend
        # Buffers must be ordinary tensors also where the caller is in inference mode.
        with torch.inference_mode(False):
            state = fresh(torch.Size((batch, *shape)), torch.float32, device).zero_()
            guidance = guide(state, cond=batched(cond), uncond=batched(uncond))
            guided = guidance.weights is not None
            self._keywords = guidance.both if guided else guidance.conditional
            self.cond = {name: self._keywords[name][-batch:] for name in cond}
            model_input = ModelInput(state, predict.dtype, scaled=table.scaled, guided=guided)
            model_input.fill(1.0)
            self._input, self._state = model_input.views[guided], model_input.state
            self._targets = model_input.targets
            # Beside the state, with a copy on the host: on a GPU, asking for a row would wait for all work before it.
            self._rows = torch.full((batch,), len(table) - 1, dtype=torch.int64, device=device)
            self._row_of = [len(table) - 1] * batch
            self._keys = torch.zeros(batch, dtype=torch.int64, device=device)
            self._times = torch.tensor(table.t, device=device)
            self._own_times = self._times[self._rows]
            self._time = torch.empty(len(self._input), dtype=self._times.dtype, device=device)
            self._time_halves = self._time.view(-1, batch)
            self._plans = plans_in_turn(
                self._state,
                table,
                keys=self._keys,
                guidance=guidance.weights,
                rescale=guidance.rescale,
                rows=self._rows,
                input_out=model_input.target,
                backend=backend,
            )

    def enter(self, i: int, key: Tensor, cond: Mapping[str, Tensor]) -> None:
        """Starts a sample in place i: its noise, the input made from it, its keywords, row 0."""
        own = slice(i, i + 1)
        state = self._state[own]
        self._keys[own] = key
        fill(state, self._keys[own], 0, INITIAL, self._backend)
        state.mul_(self._table.init_noise_sigma)
        for target in self._targets:
            torch.mul(state, float(self._table.e[0]), out=target[own])
        for name, value in cond.items():
            self.cond[name][i] = value
        self._rows[i] = self._row_of[i] = 0

    def advance(self) -> None:
        """One model call and one row for every place."""
        self._time_halves.copy_(torch.index_select(self._times, 0, self._rows, out=self._own_times))
        m = self._predict(self._input, self._time, self._keywords)
        self._plans[0](m, 0)
        self._plans.reverse()  # where two x0 are kept, each pass writes over the older one
        idle = len(self._table) - 1
        self._rows.add_(1).clamp_(max=idle)
        self._row_of = [min(row + 1, idle) for row in self._row_of]

    def idle(self) -> list[int]:
        """The places at the idle row: empty, or with a sample that has just become finished."""
        return [i for i, row in enumerate(self._row_of) if row == len(self._table) - 1]

    def leave(self, i: int) -> Tensor:
        """The sample in place i, which then holds zeros."""
        with torch.inference_mode(False):
            sample = self._state[i].clone()
        for buffer in (self._state, *self._targets):
            buffer[i].zero_()
        return sample


def _with_idle_row(table: Table) -> Table:
    """The table with one more row for places that nobody has: it reads nothing and writes zeros."""
    rows = list(table)
    rows.append({**dict.fromkeys(rows[0], 0.0), "t": rows[-1]["t"], "limit": np.inf, "e": 1.0})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Table(**columns, init_noise_sigma=table.init_noise_sigma)


def _sample_shape(shape: Sequence[int]) -> torch.Size:
    try:
        size = torch.Size(shape)
    except (TypeError, OverflowError):
        raise TypeError(f"shape must be a sequence of ints, got {type(shape).__name__}") from None
    if min(size, default=0) < 1:
        raise ValueError(f"shape must be that of one sample, without a zero, got {tuple(size)}")
    return size


def _of_one_sample(name: str, value: Any, device: torch.device, like: Tensor | None) -> Tensor:
    """A keyword's value as a tensor of its own, of the shape and dtype of `like`."""
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a tensor or a number of one sample, got {type(value).__name__}; what all requests share "
            "goes into model_kwargs"
        ) from None
    if like is not None and (tensor.shape != like.shape or not torch.can_cast(tensor.dtype, like.dtype)):
        raise ValueError(
            f"{name} must be {like.dtype} of shape {tuple(like.shape)}, as in the first request; got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)}"
        )
    dtype = tensor.dtype if like is None else like.dtype
    with torch.inference_mode(False):
        if tensor.is_cpu and tensor.ndim == 0:
            # An upload to a GPU would wait for all work before it.
            return torch.full((), tensor.item(), dtype=dtype, device=device)
        return tensor.to(device, dtype, copy=True)
