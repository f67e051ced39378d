"""The one loop: call the model, apply a row of the table, for every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from fastsample.model import Model, Predictor
from fastsample.ops.backend import choose, fresh
from fastsample.ops.noise import Seed, checked_shape, randn, sample_seeds
from fastsample.ops.step import StepPlan, step_reference
from fastsample.tables import Table

Noise = Callable[[int], Tensor] | Generator | Sequence[Generator]
CorrectX0 = Callable[[Tensor, Tensor], Tensor]


@dataclass(slots=True, repr=False)
class Step:
    """What a callback or iterator sees after a row: `x` may be changed in place (inpainting), and the change counts.

    Attributes:
        index: the row, 0 = the noisiest.
        t: the time the model was given in this row.
        x: the state after the row, float32. The loop's own buffer, overwritten by the next row: clone what you keep,
            and write into it (`step.x[...] = ...`) instead of replacing it.
        x0: the row's estimate of the clean sample, after clipping or correction; likewise a reused buffer.
    """

    index: int
    t: int | float
    x: Tensor
    x0: Tensor

    def __repr__(self) -> str:
        return f"Step(index={self.index}, t={self.t}, x of shape {tuple(self.x.shape)})"


class Sampler:
    """A table and the loop around it: what every sampler inherits. Subclasses set `table`.

    Immutable, so one sampler serves any number of models and threads at once.

    Attributes:
        table: the coefficients, a row per model call.
    """

    table: Table
    correct_x0: CorrectX0 | None = None

    def __call__(
        self,
        model: Model,
        x: Tensor | Sequence[int],
        *,
        seed: Seed = 0,
        noise: Noise | None = None,
        model_dtype: torch.dtype | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        callback: Callable[[Step], object] | None = None,
        progress: bool = False,
        out: Tensor | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Samples from the model; see fastsample.ddim for the arguments."""
        loop = _Loop(self.table, self.correct_x0, model, x, seed, noise, model_dtype, model_kwargs, backend, device)
        if out is not None:
            loop.check_out(out)
        if not (callback is None or callable(callback)):
            raise TypeError(f"callback must be callable, got {type(callback).__name__}")
        rows = loop.rows(observed=callback is not None)
        bar = _progress_bar(len(self.table)) if progress else nullcontext()
        with torch.set_grad_enabled(loop.differentiable), bar as shown:
            for step in rows:
                if callback is not None:
                    callback(step)
                if shown is not None:
                    shown.update()
        return loop.state if out is None else out.copy_(loop.state)

    def iterate(
        self,
        model: Model,
        x: Tensor | Sequence[int],
        *,
        seed: Seed = 0,
        noise: Noise | None = None,
        model_dtype: torch.dtype | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
    ) -> Iterator[Step]:
        """The same loop as a generator: yields a Step after each row; the last one's `x` is the sample.

        Arguments are checked at the call, not at the first step. `step.x` and `step.x0` are the same two tensors every
        time: clone what you keep, as in `previews = [step.x0.clone() for step in sampler.iterate(...)]`. Between steps
        the caller's own gradient mode is in force.
        """
        loop = _Loop(self.table, self.correct_x0, model, x, seed, noise, model_dtype, model_kwargs, backend, device)
        return _outside_grad_mode(loop)


def _progress_bar(total: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total)


def _outside_grad_mode(loop: _Loop) -> Iterator[Step]:
    rows = loop.rows(observed=True)
    while True:
        with torch.set_grad_enabled(loop.differentiable):
            step = next(rows, None)
        if step is None:
            return
        yield step


class _Loop:
    """One run: arguments checked and buffers made at construction, then `rows` runs it."""

    def __init__(
        self,
        table: Table,
        correct_x0: CorrectX0 | None,
        model: Model,
        x: Tensor | Sequence[int],
        seed: Seed,
        noise: Noise | None,
        model_dtype: torch.dtype | None,
        model_kwargs: Mapping[str, Any] | None,
        backend: str | None,
        device: torch.device | str | None,
    ) -> None:
        self._predictor = Predictor(model, model_dtype, model_kwargs)
        self._correct_x0 = correct_x0
        where = torch.device(
            device if device is not None else x.device if isinstance(x, Tensor) else self._predictor.device or "cpu"
        )
        self.differentiable = isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()
        double = isinstance(x, Tensor) and x.dtype == torch.float64
        self._backend = choose(backend, where, native=not (self.differentiable or double))
        # Buffers must be ordinary tensors also where the caller is in inference mode.
        with torch.inference_mode(False):
            self.state = self._initial_state(x, seed, where, torch.float64 if double else torch.float32)
            shape = self.state.shape
            self._seeds = sample_seeds(seed, shape[0]) if noise is None else None
            time_dtype = torch.int64 if table.t.dtype == np.int64 else torch.float32
            self._time = torch.empty(shape[0], dtype=time_dtype, device=where)
        self._source = None if noise is None else _noise_source(noise, self.state)
        self._table = table

    def _initial_state(self, x: Tensor | Sequence[int], seed: Seed, where: torch.device, dtype: torch.dtype) -> Tensor:
        if not isinstance(x, Tensor):
            return randn(checked_shape("x", x), seed=seed, device=where, backend=self._backend)
        if not x.is_floating_point():
            raise TypeError(f"x must be a shape or a floating-point tensor, got {x.dtype}")
        checked_shape("x", x.shape)
        state = x.to(where, dtype, copy=True, memory_format=torch.contiguous_format)
        return state if self.differentiable else state.detach()

    def check_out(self, out: Tensor) -> None:
        state = self.state
        if not isinstance(out, Tensor) or out.dtype != state.dtype:
            raise TypeError(f"out must be a {state.dtype} tensor, got {getattr(out, 'dtype', type(out).__name__)}")
        if out.shape != state.shape or out.device != state.device:
            raise ValueError(
                f"out must have shape {tuple(state.shape)} on {state.device}, got {tuple(out.shape)} on {out.device}"
            )

    def rows(self, observed: bool) -> Iterator[Step]:
        """Runs every row, leaving the result in `state`; `observed` where x0 is looked at and x may be changed."""
        return self._differentiable_rows() if self.differentiable else self._in_place_rows(observed)

    def _in_place_rows(self, observed: bool) -> Iterator[Step]:
        state, table, predict, time, correct = self.state, self._table, self._predictor, self._time, self._correct_x0
        with torch.inference_mode(False):
            model_input = state if predict.dtype == state.dtype else state.to(predict.dtype)
            keeps_x0 = observed or correct is not None
            x0 = fresh(state.shape, state.dtype, state.device) if keeps_x0 else state
        # The pass makes the next input too, unless someone may still change x after it.
        converts = model_input is not state
        fused_input = converts and not keeps_x0
        plan = StepPlan(
            state,
            table if correct is None else without_x0(table),
            seeds=self._seeds,
            out=state,
            x0_out=x0 if keeps_x0 else None,
            input_out=model_input if fused_input else None,
            backend=self._backend,
        )
        stochastic, source = table.stochastic, self._source
        address, shape = state.data_ptr(), state.shape
        for k, t in enumerate(table.t.tolist()):
            m = predict(model_input, time.fill_(t))
            plan(m, k, source(k) if source is not None and stochastic[k] else None)
            if correct is not None:
                x0.copy_(_corrected(correct, x0, time))
                limit = float(table.limit[k])
                x0.clamp_(-limit, limit)
                state.add_(x0, alpha=float(table.b[k]))
            step = Step(k, t, state, x0)
            yield step
            if observed and (step.x is not state or state.data_ptr() != address or state.shape != shape):
                raise ValueError("step.x was replaced or resized: it may only be changed in place, step.x[...] = ...")
            if converts and not fused_input:
                model_input.copy_(state)

    def _differentiable_rows(self) -> Iterator[Step]:
        table, correct = self._table, self._correct_x0
        applied = table if correct is None else without_x0(table)
        for k, t in enumerate(table.t.tolist()):
            state = self.state
            time = torch.full_like(self._time, t)
            m = self._predictor(state.to(self._predictor.dtype), time)
            z = self._source(k) if self._source is not None and table.stochastic[k] else None
            self.state, x0 = step_reference(state, m, applied, k, z, self._seeds)
            if correct is not None:
                limit = float(table.limit[k])
                x0 = _corrected(correct, x0, time).to(x0.dtype).clamp(-limit, limit)
                self.state = self.state + x0 * float(table.b[k])
            yield Step(k, t, self.state, x0)


def without_x0(table: Table) -> Table:
    """The table of a loop that adds b*x0 itself, after correcting x0 and then clamping it (improved-diffusion)."""
    return table.replace(b=0.0, limit=np.inf)


def _corrected(correct: CorrectX0, x0: Tensor, t: Tensor) -> Tensor:
    corrected = correct(x0, t)
    if not isinstance(corrected, Tensor) or corrected.shape != x0.shape:
        got = tuple(corrected.shape) if isinstance(corrected, Tensor) else type(corrected).__name__
        raise ValueError(f"correct_x0 must return a tensor of shape {tuple(x0.shape)}, got {got}")
    return corrected


def _noise_source(noise: Noise, state: Tensor) -> Callable[[int], Tensor]:
    """noise(k) for row k: the caller's own function, or torch's stream from one generator or one per sample."""
    if callable(noise) and not isinstance(noise, Generator):
        return noise
    generators = [noise] if isinstance(noise, Generator) else list(noise) if isinstance(noise, Sequence) else []
    if not generators or not all(isinstance(one, Generator) for one in generators):
        raise TypeError("noise must be a function of the row, a torch.Generator or a list of them; x_T goes in as x")
    if not isinstance(noise, Generator) and len(generators) != state.shape[0]:
        raise ValueError(f"noise must be one generator or {state.shape[0]}, one per sample; got {len(generators)}")
    with torch.inference_mode(False):
        buffer = torch.empty_like(state, device=generators[0].device)
    parts = [buffer] if isinstance(noise, Generator) else list(buffer.split(1))

    def draw(k: int) -> Tensor:
        for part, generator in zip(parts, generators, strict=True):
            part.normal_(generator=generator)
        return buffer.to(state.device)

    return draw
