"""Continuous batching: requests join and leave a batch of fixed size between model calls."""

from __future__ import annotations

import inspect
import operator
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from fastsample.caller import warn
from fastsample.checks import check_number
from fastsample.hints import hinting, meant_argument
from fastsample.loop.cached import Cached
from fastsample.loop.guidance import Shared, guidance_of
from fastsample.loop.guidance_methods import Guidance
from fastsample.loop.options import RunOptions
from fastsample.loop.places import Places
from fastsample.loop.start import warn_of_far_noise
from fastsample.model import Model, Predictor
from fastsample.ops.backend import Backend, choose
from fastsample.ops.memory import ordinary_tensors
from fastsample.ops.noise.keys import sample_keys
from fastsample.samplers.hints import not_a_sampler
from fastsample.samplers.sampler import Sampler
from fastsample.vocabulary import OF_SAMPLERS

_OF_SUBMIT = dict.fromkeys(("shape", "seed", "index"), "")
_ENTERING = -1  # the row of a place whose sample has yet to be begun


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
        """The sample, float32 of the shape that was submitted; the batcher runs until it is finished.

        Where the model raises or Ctrl-C comes, as in `step`; another call goes on from there.
        """
        while self._sample is None:
            self._batcher.step()
        return self._sample


class _Now(NamedTuple):
    """Who is where. It is replaced as a whole, by one assignment, so that no interruption leaves half of a change.

    Attributes:
        turn: of the places' buffers.
        held: the request in each place.
        rows: the row each place is at.
    """

    turn: int
    held: tuple[Request | None, ...]
    rows: tuple[int, ...]

    def at(self, i: int, request: Request | None, row: int) -> _Now:
        """The same but for place i."""
        held, rows = ((*old[:i], new, *old[i + 1 :]) for old, new in ((self.held, request), (self.rows, row)))
        return _Now(self.turn, held, rows)


class Batcher:
    """Samples requests that come and go in one batch of fixed size, each of them at a step of its own.

    A request that arrives while others are half-way joins the next model call, and one that is finished makes room: no
    one waits for a whole batch. Every model call has exactly `batch` samples; places that nobody has hold zeros.

    A request's noise and the arithmetic of its steps depend on its seed and index alone. So its result has the same
    bits in any company, where the model's output for a sample does not depend on its place in the batch, and those of
    `sampler(model, (1, *shape), seed=seed, index=index)` where it does not depend on the size of the batch either.
    (Matrix products may round differently in batches of another size, and some, between two threads, in another place.)

    Any number of threads may submit, step and wait for results: one at a time steps, and requests are taken while it
    does. (On a GPU all of them must be on one stream.) The model itself cannot call the Batcher that calls it.

    Args:
        model: called as model(x, t, **keywords), x of shape (batch, *shape) (under guidance twice the batch, the first
            half unconditional) and t with a time per sample. Otherwise as for `ddim`.
        sampler: any that starts from noise and has no correct_x0.
        batch: the number of places.
        guidance: w of classifier-free guidance, the same for all requests, or a plain Guidance without an interval;
            None or 1 calls the conditional half only.
        uncond: with guidance, the keywords of the unconditional half, as those of `submit`.
        guidance_rescale, model_dtype, backend: as in fastsample.Options.
        model_kwargs: passed to every model call; under guidance as in fastsample.Options, for samples by their place.
        cast_kwargs: as in fastsample.Options, for `model_kwargs`, `uncond` and what requests bring.

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

    @hinting(**dict.fromkeys(OF_SAMPLERS, "the sampler"), **dict.fromkeys(_OF_SUBMIT, "submit"))
    def __init__(
        self,
        model: Model,
        sampler: Sampler,
        *,
        batch: int,
        guidance: float | Guidance | None = None,
        uncond: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        model_kwargs: Mapping[str, Any] | None = None,
        cast_kwargs: bool = True,
        model_dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        if not isinstance(sampler, Sampler):
            raise not_a_sampler(sampler)
        if sampler.correct_x0 is not None:
            raise ValueError("a Batcher takes no sampler with correct_x0: call it on its own")
        sigma = sampler.table.sigma
        if sigma is not None and sigma[0] < sigma[-1]:
            raise ValueError(f"a Batcher starts from noise, {type(sampler).__name__} from clean samples")
        warn_of_far_noise(sampler.table)
        if sampler._low_start is not None:
            warn(sampler._low_start)
        if isinstance(model, Cached):
            raise ValueError("a Batcher takes no cached model: its samples are at rows of their own")
        count = _batch_size(batch)
        if guidance is not None:
            check_number("guidance", guidance.weight if isinstance(guidance, Guidance) else guidance)
        if isinstance(guidance, Guidance) and guidance.interval is not None:
            raise ValueError("guidance has an interval of times, but samples of a Batcher are at times of their own")
        self._predict = Predictor(model, model_dtype)
        device = self._predict.device or torch.device("cpu")
        self._options = RunOptions(
            guidance=guidance,
            guidance_rescale=guidance_rescale,
            model_kwargs=model_kwargs,
            cast_kwargs=cast_kwargs,
        )
        # Refuses what cannot work; these keywords are those of one sample.
        of_one = {name: Shared(value) for name, value in uncond.items()} if isinstance(uncond, Mapping) else uncond
        like = torch.empty(count, dtype=torch.float32, device=device)
        guidance_of(like, self._options._replace(cond=of_one, uncond=of_one), self._predict.known_dtype)
        self._table, self._uncond = sampler.table, dict(uncond or {})
        self._device, self._backend = device, choose(backend, device, native=True)
        self._now = _Now(0, (None,) * count, (len(sampler.table),) * count)
        # Of the first request on, under 0: its places and who waits for one.
        self._opened: dict[int, tuple[Places, deque[Request]]] = {}
        self._stepping = threading.RLock()

    def submit(self, shape: Sequence[int], seed: int | None = None, index: int = 0, **cond: Any) -> Request:
        """Queues one sample.

        Args:
            shape: of the sample alone, without a batch axis; the same for all requests of a Batcher.
            seed, index: the sample is the one at place `index` of the set that `seed` names, as in
                fastsample.Options; ints, or integer tensors without an axis. Default a fresh seed.
            **cond: the model's keywords for this sample: tensors without a batch axis, or numbers. They are stacked to
                (batch, ...). The first request decides on names, shapes and dtypes. Tensors of a model's GPU join
                without making the host wait for it.

        Raises:
            ValueError, TypeError: for an empty shape, a seed or index that is not an int, and a shape or keywords
                unlike those of the first request (or of `uncond`). RuntimeError: where the model calls it. Nothing
                changes then.
        """
        self._refuse_the_model("submit")
        size = _sample_shape(shape)
        for name, value in (("seed", seed), ("index", index)):
            if getattr(value, "ndim", 0) or isinstance(value, Sequence):
                raise TypeError(f"{name} must be an int, since a request is one sample; got {value!r}")
        places, waiting = self._opened.get(0, (None, None))
        if places is not None:
            if size != places.shape:
                raise ValueError(f"shape must be that of the first request, {tuple(places.shape)}, got {tuple(size)}")
            if unlike := sorted(set(cond) ^ set(places.cond)):
                raise ValueError(f"every request must give the keywords of the first; only one has {', '.join(unlike)}")
        like = {} if places is None else {name: batched[0] for name, batched in places.cond.items()}
        values = {name: _of_one_sample(name, value, self._device, like.get(name)) for name, value in cond.items()}
        request = Request(self, sample_keys(seed, index, 1, self._device), values)
        if waiting is None:
            # Places and request at once: of several threads one is first, and the others are told to fit in.
            opened = self._make_places(size, values), deque([request])
            if self._opened.setdefault(0, opened) is not opened:
                return self.submit(shape, seed, index, **cond)
        else:
            waiting.append(request)
        return request

    @torch.no_grad()
    def step(self) -> int:
        """Lets waiting requests in, calls the model once, and takes everyone one row further.

        All or nothing: where the model raises, a request cannot enter or Ctrl-C comes, every request stays where it
        was, and the next step tries again. But requests whose input the model has written to begin again.

        Returns:
            How many requests are not finished, so that `while batcher.step(): ...` runs until all are. Where there are
            none the model is not called.

        Raises:
            RuntimeError: where the model calls it.
        """
        self._refuse_the_model("step")
        return self._step_alone()

    def _step_alone(self) -> int:
        with self._stepping:
            if not self._opened:
                return 0
            places, waiting = self._opened[0]
            self._finish(places)
            self._let_in(places, waiting)
            if not any(self._now.held):
                return 0
            self._advance(places)
            self._finish(places)
            return len(waiting) + sum(request is not None for request in self._now.held)

    def _refuse_the_model(self, method: str) -> None:
        """Raises inside of a step of this thread; without one a lock it holds is left from an interruption."""
        while self._stepping._is_owned():  # type: ignore[attr-defined]
            frame = inspect.currentframe()
            while frame is not None:
                if frame.f_code is Batcher._step_alone.__code__ and frame.f_locals["self"] is self:
                    raise RuntimeError(f"{method} was called inside a step of this Batcher: its model cannot use it")
                frame = frame.f_back
            self._stepping.release()

    # What follows leaves self._now and what it stands for true after every statement, and can be done again.

    def _let_in(self, places: Places, waiting: deque[Request]) -> None:
        """Gives free places to those who wait, and begins the samples that have not been begun."""
        if waiting and any(waiting[0] is request for request in self._now.held):
            waiting.popleft()  # interrupted in between
        for i, request in enumerate(self._now.held):
            if request is None and waiting:
                self._now = self._now.at(i, waiting[0], _ENTERING)
                waiting.popleft()
        turn, held, rows = self._now
        for i, (request, row) in enumerate(zip(held, rows, strict=True)):
            if request is not None and row == _ENTERING:
                places.enter(turn, i, request._key, request._cond)
                self._now = self._now.at(i, request, 0)

    def _advance(self, places: Places) -> None:
        """One model call and one row for everyone."""
        turn, held, rows = self._now
        writes = places.writes(turn)
        try:
            following = places.advance(turn)
        except BaseException:
            if places.writes(turn) != writes:
                self._now = _Now(turn, held, tuple(row if row == places.idle_row else _ENTERING for row in rows))
            raise
        self._now = _Now(following, held, tuple(min(row + 1, places.idle_row) for row in rows))

    def _finish(self, places: Places) -> None:
        """Hands over the samples that have become finished; zeros take their places."""
        turn, held, rows = self._now
        for i, (request, row) in enumerate(zip(held, rows, strict=True)):
            if request is not None and row == places.idle_row:
                if request._sample is None:
                    request._sample = places.sample(turn, i)
                places.empty(turn, i)
                self._now = self._now.at(i, None, row)
                request._cond = {}

    def _make_places(self, shape: torch.Size, cond: Mapping[str, Tensor]) -> Places:
        uncond = {
            name: _of_one_sample(f"uncond's {name}", value, self._device, cond.get(name))
            for name, value in self._uncond.items()
        }
        return Places(
            shape,
            cond,
            uncond,
            batch=len(self._now.held),
            predict=self._predict,
            table=self._table,
            options=self._options,
            device=self._device,
            backend=self._backend,
        )


def _batch_size(batch: SupportsIndex) -> int:
    try:
        size = 0 if isinstance(batch, bool) else operator.index(batch)
    except TypeError:
        size = 0
    if size < 1:
        raise ValueError(f"batch must be an int of at least 1, got {batch!r}")
    return size


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
        tensor = value.detach() if isinstance(value, Tensor) else _of_numbers(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a tensor or a number of one sample, got {type(value).__name__}; what all requests share "
            f"goes into model_kwargs{meant_argument(name, _OF_SUBMIT)}"
        ) from None
    if tensor.layout != torch.strided or (tensor.is_meta and device.type != "meta"):
        raise TypeError(f"{name} must be a dense tensor that has values, got {tensor.layout} on {tensor.device}")
    if like is not None and (tensor.shape != like.shape or not torch.can_cast(tensor.dtype, like.dtype)):
        raise ValueError(
            f"{name} must be {like.dtype} of shape {tuple(like.shape)}, as in the first request; got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)}"
        )
    dtype = tensor.dtype if like is None else like.dtype
    with ordinary_tensors():
        if tensor.is_cpu and tensor.ndim == 0:
            # An upload to a GPU would wait for all work before it.
            return torch.full((), tensor.item(), dtype=dtype, device=device)
        # An ordinary tensor, whatever the caller's own kind does when it is copied.
        return torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)


def _of_numbers(value: Any) -> Tensor:
    """Integers and bools as torch has them, floats in float32 whatever torch's default dtype is."""
    array = np.asarray(value)
    dtype = torch.float32 if array.dtype == np.float64 and not hasattr(value, "dtype") else None
    return torch.tensor(value, dtype=dtype, device="cpu")
