"""The one loop: call the model, apply a row of the table, for every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fastsample.loop.guidance import UNGUIDED, Guidance, guidance_of
from fastsample.loop.inpainting import Inpainting
from fastsample.loop.noise_source import noise_source
from fastsample.loop.options import Noise, Step
from fastsample.loop.start import checked_start, noise_level, start_of
from fastsample.loop.workspace import Kind, Workspace, leave, taken, without_x0, worth_sharing
from fastsample.model import Model, Predictor
from fastsample.ops.backend import choose
from fastsample.ops.memory import HUGE, fresh_like, mark_written, ordinary_tensors
from fastsample.ops.noise import INITIAL, normals
from fastsample.ops.noise.keys import Index, Seed, renew_keys, sample_keys
from fastsample.ops.step.compiled import functional_step
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.reductions import limited
from fastsample.ops.tracing import recording, transformed
from fastsample.tables import Table

if TYPE_CHECKING:
    from fastsample.samplers.sampler import Sampler

CorrectX0 = Callable[[Tensor, Tensor], Tensor]
Rows = list[tuple[int, int | float, bool, bool, tuple[float, float]]]


class Loop:
    """A run: arguments are checked and memory found at construction; `start` and `rows` then run it, again and again.

    On a GPU the host waits for nothing while rows run and uploads nothing, so that they can be captured as a graph; but
    noise from a generator on the CPU, or from a function that makes it there, is uploaded in every row that adds some.

    Attributes:
        state: where the sample comes to be: the state before the first row, until rows run.
        keys: of the noise, one per sample, beside the state.
        guidance, inpainting: what these options came to; None without inpainting.
        schedule: see scheduled_rows.
        differentiable: whether gradients go through the run.
    """

    def __init__(
        self,
        sampler: Sampler,
        model: Model,
        x: Tensor | Sequence[int],
        *,
        observed: bool = False,
        borrows: bool = False,
        noise: Noise | None = None,
        model_dtype: torch.dtype | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        cast_kwargs: bool = True,
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
        """The arguments are those of fastsample.Options, and

        Args:
            observed: whether someone looks at x0, and may change x, after a row.
            borrows: whether another run may have the memory once this one is closed.
        """
        self._predict = Predictor(model, model_dtype)
        given = x if isinstance(x, Tensor) else None
        where = device if device is not None else (given if given is not None else self._predict).device
        where = where if isinstance(where, torch.device) else torch.device("cpu" if where is None else where)
        shape = checked_start(x)
        requires_grad = given is not None and given.requires_grad and torch.is_grad_enabled()
        self.differentiable = requires_grad or transformed()
        self._in_fresh_tensors = self.differentiable or recording()
        double = given is not None and given.dtype == torch.float64
        self._backend = choose(backend, where, native=not (self.differentiable or double))
        table, start = start_of(sampler, given is not None, strength, start_step)
        self._table = table
        self._noised_to = None if strength is None else noise_level(table, start)
        self._correct_x0, self._observed = sampler.correct_x0, observed
        self._asked = guidance, guidance_rescale, guidance_interval
        self._keywords_dtype = self._predict.known_dtype if cast_kwargs else None
        draws_in_rows = noise is None and any(table.stochastic[start:])
        inpaints = mask is not None or known is not None
        self._draws = draws_in_rows or inpaints or strength is not None
        self._changes = observed or self._correct_x0 is not None or inpaints
        self._shape, self._where, self._dtype = shape, where, torch.float64 if double else torch.float32
        with ordinary_tensors():
            self.guidance = self._guided(model_kwargs, cond, uncond)
            self._predict.guided = self.guidance.weights is not None
            self.schedule = scheduled_rows(table, self.guidance, start)
            self._memory = memory = self._find_memory(noise is None, isinstance(guidance, int | float), borrows)
            self.state, self.keys = memory.state, memory.keys
            self._source = None if noise is None else noise_source(noise, self.state)
            self.inpainting = None
            if inpaints:
                self.inpainting = Inpainting(mask, known, self.state, table, self.keys, self._backend)

    def _guided(
        self, model_kwargs: Mapping[str, Any] | None, cond: Mapping[str, Any] | None, uncond: Mapping[str, Any] | None
    ) -> Guidance:
        guidance, rescale, interval = self._asked
        if guidance is model_kwargs is cond is uncond is interval is None and rescale == 0:
            return UNGUIDED
        like = torch.empty(self._shape[0], dtype=self._dtype, device=self._where)
        return guidance_of(like, *self._asked, model_kwargs, cond, uncond, self._keywords_dtype)

    def _find_memory(self, draws: bool, one_weight: bool, borrows: bool) -> Workspace:
        guidance = self.guidance
        kind = Kind(
            id(self._table),
            self._shape,
            self._dtype,
            self._where,
            self._predict.dtype,
            guidance.weights is not None,
            one_weight,
            guidance.rescale,
            draws,
            self._changes,
            self._correct_x0 is not None,
            self._backend,
        )
        # What callbacks and correct_x0 were shown they may keep.
        self._shares = borrows and not (self._changes or self._in_fresh_tensors) and worth_sharing(kind)
        self._keeps = not borrows or self._shares
        fresh = self._in_fresh_tensors
        memory = taken(kind, self._table) if self._shares else Workspace(kind, self._table, in_fresh_tensors=fresh)
        if guidance.weights is not None and memory.weights is not None and not self._in_fresh_tensors:
            memory.weights.copy_(guidance.weights)
            self.guidance = replace(guidance, weights=memory.weights)
        return memory

    def start(self, x: Tensor | Sequence[int], seed: Seed | None, index: Index) -> None:
        """The state before the first row: x itself, with noise where it is clean, or x_T drawn from the seed."""
        if self._in_fresh_tensors:
            self._start_afresh(x, seed, index)
            return
        if seed is not None or self._draws or not isinstance(x, Tensor):
            renew_keys(self.keys, seed, index)
        state = self.state
        if isinstance(x, Tensor):
            # What is not pinned has been read when this returns, so that the host need not wait for the copy.
            self._noised(state.copy_(x, non_blocking=not state.is_cpu))
            return
        self._memory.draw()
        if self._table.init_noise_sigma != 1:
            state.mul_(self._table.init_noise_sigma)

    def _start_afresh(self, x: Tensor | Sequence[int], seed: Seed | None, index: Index) -> None:
        """`start` in operations that gradients, transforms and recorders can follow."""
        if seed is not None or self._draws or not isinstance(x, Tensor):
            self.keys.copy_(sample_keys(seed, index, self._shape[0], self._where))
        if isinstance(x, Tensor):
            x = x.to(self._where, self._dtype, copy=True, memory_format=torch.contiguous_format)
            self.state = self._noised(x if self.differentiable else x.detach())
        else:
            drawn = normals(self._shape, self.keys, 0, INITIAL, self._where, self._backend)
            self.state = drawn * self._table.init_noise_sigma

    def _noised(self, x0: Tensor) -> Tensor:
        """Clean samples at the level of the first row, in place; those that are noisy already as they are."""
        if self._noised_to is None:
            return x0
        alpha, sigma = self._noised_to
        z = normals(x0.shape, self.keys, 0, INITIAL, self._where, self._backend).to(x0.dtype)
        return x0.mul_(alpha).add_(z.mul_(sigma))

    def check_x(self, x: Tensor | Sequence[int]) -> None:
        """Raises TypeError or ValueError where this run cannot start from x."""
        if checked_start(x) != self._shape:
            raise ValueError(f"x must have the run's shape {tuple(self._shape)}, got {tuple(checked_start(x))}")
        if not isinstance(x, Tensor):
            return
        if (x.dtype == torch.float64) != (self._dtype == torch.float64):
            raise ValueError(f"x is {x.dtype}, and the run computes in {self._dtype}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x requires gradients, which this run does not compute: give x.detach()")

    def check_out(self, out: Tensor) -> None:
        """Raises TypeError or ValueError where the result cannot be copied to `out`."""
        if not isinstance(out, Tensor) or out.dtype != self._dtype:
            got = out.dtype if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"out must be a {self._dtype} tensor, got {got}")
        place = self.state.device
        if out.shape != self._shape or out.device != place:
            raise ValueError(
                f"out must have shape {tuple(self._shape)} on {place}, got {tuple(out.shape)} on {out.device}"
            )
        if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
            raise ValueError("out is expanded: several of its elements share memory")
        if out.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError("out was made in inference mode, outside of which it cannot be written")
        if out.requires_grad and out.is_leaf and self.differentiable:
            raise ValueError("out requires gradients: it cannot be written in place")

    def ask(
        self, model_kwargs: Mapping[str, Any] | None, cond: Mapping[str, Any] | None, uncond: Mapping[str, Any] | None
    ) -> None:
        """Other keywords for the model from now on; all else as it was asked for."""
        found = self._guided(model_kwargs, cond, uncond)
        self.guidance = replace(found, weights=self._memory.weights)

    def warn_of_training(self) -> None:
        """As at construction, for a model that has changed since."""
        self._predict.warn_of_training()

    def rows(self) -> Iterator[Step | None]:
        """Runs every row; yields a Step after it where someone looks at it."""
        return self._differentiable_rows() if self._in_fresh_tensors else self._in_place_rows()

    def result(self) -> Tensor:
        """The sample, once all rows have run, in storage of its own."""
        if self._in_fresh_tensors or not (self._keeps or self._memory.input.lends_state):
            return self.state
        with ordinary_tensors():
            small = self.state.nbytes < HUGE
            return self.state.clone() if small else fresh_like(self.state).copy_(self.state)

    def close(self) -> None:
        """Once at the end of a run that did not fail: another one may have the memory."""
        if self._shares:
            leave(self._memory)

    def _in_place_rows(self) -> Iterator[Step | None]:
        table, predict, memory, changes = self._table, self._predict, self._memory, self._changes
        model, model_input, source, keeps_x0 = predict.model, memory.input, self._source, table.keeps_x0
        model_input.fill(float(table.e[self.schedule[0][0]]))
        inputs, times, needed = model_input.views, memory.times, model_input.needed
        keywords, last = (self.guidance.conditional, self.guidance.both), len(table) - 1
        threads, version_of_times = torch.get_num_threads(), times[False][0]._version
        # A graph runs the rows more than once, from the same turn.
        turns_of = cycle(memory.plans)
        for k, t, guided, next_guided, level in self.schedule:
            x, time = inputs[guided], times[guided][k]
            version = x._version
            m = model(x, time, **keywords[guided])
            if type(m) is not Tensor or x._version != version or x.requires_grad or predict.guided:
                m = predict.checked(m, x, version)
            z = source(k) if source is not None and table.stochastic[k] else None
            plan = next(turns_of)
            if not changes:
                plain, writes_input = plan.plain[k], k < last and needed[next_guided]
                if plain is None or z is not None or not plain(m, keeps_x0[k], writes_input, threads):
                    plan(m, k, z, keeps_x0[k], writes_input)
                yield None
                continue
            plan(m, k, z)
            yield from self._changed(Step(k, t, self.state, cast(Tensor, plan.x0_out), *level), times[False][k])
            if k < last:
                model_input.fill(float(table.e[k + 1]))
        predict.check_times(times[False][0], version_of_times)
        if name := memory.replaced():
            raise ValueError(
                f"the model replaced the memory of its argument {name}, which is the loop's own buffer: let it work on "
                f"a copy, such as {name} = {name}.clone()"
            )

    def _changed(self, step: Step, time: Tensor) -> Iterator[Step | None]:
        """What follows a row's pass where x may change: correct_x0, inpainting, and whoever looks at the step."""
        self._change(step.x, step.x0, step.index, time)
        if self._observed:
            yield from self._shown(step)
        else:
            yield None

    def _change(self, state: Tensor, x0: Tensor, k: int, t: Tensor) -> None:
        """What a row of correct_x0 or inpainting does after its pass, in place."""
        if self._correct_x0 is not None:
            address = x0.data_ptr()
            x0.copy_(_corrected(self._correct_x0, x0.detach(), t, self._table, k))
            if x0.data_ptr() != address:
                raise ValueError("correct_x0 resized its argument x0, which is the loop's own buffer: return another")
            state.add_(x0, alpha=float(self._table.b[k]))
        if self.inpainting is not None:
            self.inpainting.apply(state, k)

    def _shown(self, step: Step) -> Iterator[Step]:
        state, x0 = step.x, step.x0
        # Autograd cannot see kernels write: whoever uses these between rows shall not get stale gradients.
        mark_written(state)
        mark_written(x0)
        yield step
        moved = self._memory.replaced_by_callback()
        if step.x is not state or step.x0 is not x0 or moved is not None:
            name = moved or ("step.x" if step.x is not state else "step.x0")
            raise ValueError(f"{name} was replaced or resized: it may only be changed in place, {name}[...] = ...")

    def _differentiable_rows(self) -> Iterator[Step | None]:
        table, correct, guidance = self._table, self._correct_x0, self.guidance
        applied = table if correct is None else without_x0(table)
        history: list[Tensor] = []
        for k, t, guided, _, level in self.schedule:
            state = self.state
            model_input = (state * float(table.e[k])).to(self._predict.dtype)
            time = self._memory.times[guided][k].clone()
            if guided:
                m = self._predict(torch.cat([model_input, model_input]), time, guidance.both)
            else:
                m = self._predict(model_input, time, guidance.conditional)
            # Generators fill one buffer again and again, which autograd may have kept.
            z = self._source(k).clone() if self._source is not None and table.stochastic[k] else None
            operands = Operands(
                state, applied, self.keys, guidance.weights, rescale=guidance.rescale, history=tuple(history)
            )
            self.state, x0 = functional_step(operands, m, k, z, self._backend)
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


def scheduled_rows(table: Table, guidance: Guidance, start: int) -> Rows:
    """(index, the model's time, whether it is guided, whether the next one is, the level that it leads to) of each row.

    Raises:
        ValueError: where guidance is asked for and no row is guided.
    """
    if guidance.weights is None and start == 0:
        return table.derived("rows", lambda own: _rows(own, [False] * len(own)))
    guided = [guidance.at(t) for t in table.times]
    if guidance.weights is not None and not any(guided):
        raise ValueError(
            f"guidance_interval={guidance.interval} holds none of the times {table.times[0]} .. {table.times[-1]} that "
            "the model is given"
        )
    return _rows(table, guided)[start:]


def _rows(table: Table, guided: list[bool]) -> Rows:
    return list(zip(range(len(table)), table.times, guided, [*guided[1:], False], table.levels, strict=True))


def _corrected(correct: CorrectX0, x0: Tensor, t: Tensor, table: Table, k: int) -> Tensor:
    """What the caller makes of x0, limited as row k says."""
    corrected = correct(x0, t)
    if not isinstance(corrected, Tensor) or corrected.shape != x0.shape:
        got = tuple(corrected.shape) if isinstance(corrected, Tensor) else type(corrected).__name__
        raise ValueError(f"correct_x0 must return a tensor of shape {tuple(x0.shape)}, got {got}")
    return limited(corrected.to(x0.dtype), float(table.limit[k]), float(table.quantile[k]))
