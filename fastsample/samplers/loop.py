"""The one loop: call the model, apply a row of the table, for every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastsample.model import Model, Predictor
from fastsample.ops.backend import choose, fresh, mark_written
from fastsample.ops.keys import Index, Seed, sample_keys
from fastsample.ops.noise import INITIAL, normals
from fastsample.ops.reductions import limited
from fastsample.ops.step_plan import StepPlan
from fastsample.ops.step_recorded import functional_step
from fastsample.ops.transforms import recording, transformed
from fastsample.samplers.guidance import guidance_of
from fastsample.samplers.inpainting import Inpainting
from fastsample.samplers.inputs import ModelInput
from fastsample.samplers.noise_source import noise_source
from fastsample.samplers.run import Noise, Step
from fastsample.samplers.start import checked_start, first_row
from fastsample.tables import Table

if TYPE_CHECKING:
    from fastsample.samplers.sampler import Sampler

CorrectX0 = Callable[[Tensor, Tensor], Tensor]


class Loop:
    """One run: arguments checked and buffers made at construction, then `rows` runs it.

    On a GPU the host waits for nothing while rows run and uploads nothing, so that they can be captured as a graph; but
    noise from a generator on the CPU, or from a function that makes it there, is uploaded in every row that adds some.

    Attributes:
        state: where the sample comes to be: the state before the first row, until rows run.
        keys: one per sample, beside the state.
        guidance, inpainting: what these options came to; None without inpainting.
        schedule: for each row that runs its index, the model's time, whether it and the next one are guided, and the
            noise level it leads to.
        differentiable: whether gradients go through the run.
    """

    def __init__(
        self,
        sampler: Sampler,
        model: Model,
        x: Tensor | Sequence[int],
        *,
        seed: Seed | None = None,
        index: Index = 0,
        noise: Noise | None = None,
        model_dtype: torch.dtype | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        guidance: float | Sequence[float] | Tensor | None = None,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        strength: float | None = None,
        start_step: int = 0,
        backend: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._predict = Predictor(model, model_dtype)
        given = x if isinstance(x, Tensor) else None
        where = torch.device(
            device if device is not None else self._predict.device or "cpu" if given is None else given.device
        )
        requires_grad = given is not None and given.requires_grad and torch.is_grad_enabled()
        self.differentiable = requires_grad or transformed()
        self._in_fresh_tensors = self.differentiable or recording()
        double = given is not None and given.dtype == torch.float64
        self._backend = choose(backend, where, native=not (self.differentiable or double))
        start = first_row(sampler, given is not None, strength, start_step)
        self._table = table = sampler.table_from(start) if start else sampler.table
        self._noised_from = None if strength is None else start
        self._correct_x0 = sampler.correct_x0
        self._where, self._dtype = where, torch.float64 if double else torch.float32
        # Buffers must be ordinary tensors also where the caller is in inference mode.
        with torch.inference_mode(False):
            shape = checked_start(x)
            batch = shape[0]
            self.keys = sample_keys(seed, index, batch, where)
            self.state = state = self.initial_state(shape if given is None else given, self.keys)
            self.guidance = guidance_of(
                state, guidance, guidance_rescale, guidance_interval, model_kwargs, cond, uncond
            )
            self.inpainting = None
            if mask is not None or known is not None:
                self.inpainting = Inpainting(mask, known, state, table, self.keys, self._backend)
            guided = [False] * len(table)
            if self.guidance.weights is not None:
                guided = [self.guidance.at(t) for t in table.times]
                if not any(guided):
                    raise ValueError(
                        f"guidance_interval={guidance_interval} holds none of the times {table.times[0]} .. "
                        f"{table.times[-1]} that the model is given"
                    )
            time_dtype = torch.int64 if table.t.dtype == np.int64 else torch.float32
            self._time = torch.empty(2 * batch if any(guided) else batch, dtype=time_dtype, device=where)
        self._source = None if noise is None else noise_source(noise, state)
        self._step_keys = self.keys if noise is None else None
        self._input: ModelInput | None = None
        self._plans: list[StepPlan] = []
        rows = zip(range(len(table)), table.times, guided, [*guided[1:], False], table.levels, strict=True)
        self.schedule = list(rows)[start:]

    def initial_state(self, x: Tensor | torch.Size, keys: Tensor) -> Tensor:
        """The state before the first row: x itself, with noise where it is clean, or x_T drawn from the keys."""
        if not isinstance(x, Tensor):
            drawn = self._initial_noise(x, keys)
            return drawn if self._table.init_noise_sigma == 1 else drawn.mul_(self._table.init_noise_sigma)
        state = x.to(self._where, self._dtype, copy=True, memory_format=torch.contiguous_format)
        state = state if self.differentiable else state.detach()
        if self._noised_from is None:
            return state
        alpha, sigma = self._table.alpha, self._table.sigma
        if alpha is None or sigma is None:
            raise ValueError("strength needs a table with noise levels: Table(..., alpha=, sigma=)")
        z = self._initial_noise(x.shape, keys).to(state.dtype)
        return state * float(alpha[self._noised_from]) + z * float(sigma[self._noised_from])

    def _initial_noise(self, shape: torch.Size, keys: Tensor) -> Tensor:
        return normals(shape, keys, 0, INITIAL, self._where, self._backend)

    def check_out(self, out: Tensor) -> None:
        """Raises TypeError or ValueError where the result cannot be copied to `out`."""
        state = self.state
        if not isinstance(out, Tensor) or out.dtype != state.dtype:
            raise TypeError(f"out must be a {state.dtype} tensor, got {getattr(out, 'dtype', type(out).__name__)}")
        if out.shape != state.shape or out.device != state.device:
            raise ValueError(
                f"out must have shape {tuple(state.shape)} on {state.device}, got {tuple(out.shape)} on {out.device}"
            )

    def restart(self, x: Tensor | torch.Size, seed: Seed | None, index: Index) -> None:
        """Another run in the same memory: its keys and its state before the first row."""
        # What is not pinned has been read when this returns, so that the host need not wait for the copy.
        self.keys.copy_(sample_keys(seed, index, len(self.keys), self._where), non_blocking=True)
        self.state.copy_(self.initial_state(x, self.keys))

    def rows(self, observed: bool) -> Iterator[Step | None]:
        """Runs every row; yields a Step after it where `observed`: x0 is looked at and x may be changed."""
        return self._differentiable_rows() if self._in_fresh_tensors else self._in_place_rows(observed)

    def result(self) -> Tensor:
        """The sample, once all rows have run, in storage of its own."""
        return self.state if self._input is None else self._input.result()

    def prepare(self, observed: bool) -> tuple[ModelInput, list[StepPlan], bool]:
        """Makes what rows read and write, once, on the current stream; `rows` does so too where nobody did.

        Returns:
            The model's input, the plans, and whether someone may still change x after a step, so that the step does not
            make the next input.
        """
        table = self._table
        changes = observed or self._correct_x0 is not None or self.inpainting is not None
        if self._input is not None:
            return self._input, self._plans, changes
        # Buffers must be ordinary tensors also where the caller is in inference mode.
        with torch.inference_mode(False):
            guided = len(self._time) > len(self.state)
            self._input = ModelInput(self.state, self._predict.dtype, scaled=table.scaled, guided=guided)
            self.state = self._input.state
            self._plans = plans_in_turn(
                self.state,
                table if self._correct_x0 is None else without_x0(table),
                keeps_x0=changes,
                keys=self._step_keys,
                guidance=self.guidance.weights,
                rescale=self.guidance.rescale,
                input_out=None if changes else self._input.target,
                backend=self._backend,
            )
        return self._input, self._plans, changes

    def _in_place_rows(self, observed: bool) -> Iterator[Step | None]:
        table, predict, guidance = self._table, self._predict, self.guidance
        # A graph runs the rows more than once, in the same memory and from the same turn.
        model_input, plans, changes = self.prepare(observed)
        state = self.state
        model_input.fill(float(table.e[self.schedule[0][0]]))
        stochastic, source, keeps_x0, needed = table.stochastic, self._source, table.keeps_x0, model_input.needed
        times, inputs = (self._time[-len(state) :], self._time), model_input.views
        keywords, last, turns_of = (guidance.conditional, guidance.both), len(table) - 1, cycle(plans)
        for k, t, guided, next_guided, level in self.schedule:
            m = predict(inputs[guided], times[guided].fill_(t), keywords[guided])
            z = source(k) if source is not None and stochastic[k] else None
            plan = next(turns_of)
            if not changes:
                plan(m, k, z, keeps_x0[k], k < last and needed[next_guided])
                yield None
                continue
            plan(m, k, z)
            x0 = plan.x0_out
            assert x0 is not None
            self._change(state, x0, k, times[0])
            if observed:
                yield from self._observed(Step(k, t, state, x0, *level))
            else:
                yield None
            if k < last:
                model_input.fill(float(table.e[k + 1]))

    def _change(self, state: Tensor, x0: Tensor, k: int, t: Tensor) -> None:
        """What a row of correct_x0 or inpainting does after its pass, in place."""
        if self._correct_x0 is not None:
            x0.copy_(_corrected(self._correct_x0, x0, t, self._table, k))
            state.add_(x0, alpha=float(self._table.b[k]))
        if self.inpainting is not None:
            self.inpainting.apply(state, k)

    def _observed(self, step: Step) -> Iterator[Step]:
        state, x0 = step.x, step.x0
        # Autograd cannot see kernels write: whoever uses these between rows shall not get stale gradients.
        mark_written(state)
        mark_written(x0)
        places = [plan.places() for plan in self._plans]
        yield step
        if step.x is not state or step.x0 is not x0 or [plan.places() for plan in self._plans] != places:
            x_moved = step.x is not state or any(plan.places()["x"] != places[0]["x"] for plan in self._plans)
            name = "step.x" if x_moved else "step.x0"
            raise ValueError(f"{name} was replaced or resized: it may only be changed in place, {name}[...] = ...")

    def _differentiable_rows(self) -> Iterator[Step | None]:
        table, correct, guidance = self._table, self._correct_x0, self.guidance
        applied = table if correct is None else without_x0(table)
        history: list[Tensor] = []
        for k, t, guided, _, level in self.schedule:
            state = self.state
            model_input = (state * float(table.e[k])).to(self._predict.dtype)
            time = torch.full_like(self._time, t)[: 2 * len(state) if guided else len(state)]
            if guided:
                m = self._predict(torch.cat([model_input, model_input]), time, guidance.both)
            else:
                m = self._predict(model_input, time, guidance.conditional)
            # Generators fill one buffer again and again, which autograd may have kept.
            z = self._source(k).clone() if self._source is not None and table.stochastic[k] else None
            operands = state, m, applied, k, z, self._step_keys, guidance.weights, guidance.rescale, history
            self.state, x0 = functional_step(*operands, self._backend)
            if correct is not None:
                x0 = _corrected(correct, x0, time[: len(state)], table, k)
                self.state = self.state + x0 * float(table.b[k])
            if self.inpainting is not None:
                self.state = self.state.clone()
                self.inpainting.apply(self.state, k)
            history = [x0, *history][:2]
            step = Step(k, t, self.state, x0, *level)
            yield step
            if step.x is not self.state:
                raise ValueError("step.x was replaced: it may only be changed in place, step.x[...] = ...")


def plans_in_turn(state: Tensor, table: Table, *, keeps_x0: bool = False, **fixed: Any) -> list[StepPlan]:
    """The plan of a state that is stepped in place, or two that take turns where two earlier x0 are read.

    Each keeps x0 where a later row reads it, over the oldest one; `keeps_x0` where no row does but the caller.
    """
    x0 = [fresh(state.shape, state.dtype, state.device) for _ in range(table.history or int(keeps_x0))]
    turns = [x0, x0[::-1]] if len(x0) == 2 else [x0]
    return [
        StepPlan(
            state,
            table,
            history=history if table.history else (),
            out=state,
            x0_out=history[-1] if history else None,
            **fixed,
        )
        for history in turns
    ]


def without_x0(table: Table) -> Table:
    """The table of a loop that adds b*x0 itself, after correcting x0 and then limiting it (improved-diffusion)."""
    return table.replace(b=0.0, limit=np.inf, quantile=0.0)


def _corrected(correct: CorrectX0, x0: Tensor, t: Tensor, table: Table, k: int) -> Tensor:
    """What the caller makes of x0, limited as row k says."""
    corrected = correct(x0, t)
    if not isinstance(corrected, Tensor) or corrected.shape != x0.shape:
        got = tuple(corrected.shape) if isinstance(corrected, Tensor) else type(corrected).__name__
        raise ValueError(f"correct_x0 must return a tensor of shape {tuple(x0.shape)}, got {got}")
    return limited(corrected.to(x0.dtype), float(table.limit[k]), float(table.quantile[k]))
