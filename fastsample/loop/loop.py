"""The one loop: call the model, apply a row of the table, for every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from fastsample.checks import usable_device
from fastsample.loop.cached import Cached
from fastsample.loop.fresh_tensors import FreshTensors
from fastsample.loop.guidance import UNGUIDED, GuidedRows, guidance_of
from fastsample.loop.guidance_methods import Bending
from fastsample.loop.inpainting import Inpainting
from fastsample.loop.noise_source import noise_source
from fastsample.loop.options import CorrectX0, RunOptions, Step
from fastsample.loop.pool import leave, taken, worth_sharing
from fastsample.loop.row_schedule import row_schedule
from fastsample.loop.start import checked_start, noise_level, warn_of_far_noise
from fastsample.loop.workspace import Kind, Workspace
from fastsample.model import Model, Predictor
from fastsample.ops.address import check_apart, check_strided
from fastsample.ops.backend import choose
from fastsample.ops.memory import mark_written, ordinary_tensors
from fastsample.ops.noise.keys import Index, Seed
from fastsample.ops.tracing import recording, transformed
from fastsample.tables import Table

# Of x, strength and start_step the table of a run and its first row.
FirstRow = Callable[[Tensor | Sequence[int], float | None, int], tuple[Table, int]]


class Loop:
    """A run of a table: arguments are checked and memory is found at construction; then it runs again and again.

    It knows tables and no samplers. Whoever runs one calls, in this order:

        check_x, check_out    raise where this run cannot start from an x, or its result cannot go to an `out`
        start                 makes the state before the first row
        rows                  runs every row, as a generator
        result                gives the sample in storage of its own
        close                 lets another run have the memory

    Between runs `ask` gives the model other keywords, and `guidance_for` tells what other options would make of the
    guidance. On a GPU the host waits for nothing while rows run and uploads nothing, so that they can be captured as a
    graph; but noise from a generator on the CPU, or from a function that makes it there, is uploaded in every row that
    adds some.

    Args:
        rows: of x, strength and start_step gives the table and its row that the run starts at, once the model, x and
            the backend have been checked; raises where the options name none.
        correct_x0: what replaces each row's x0, or None.
        model, x: as for a sampler.
        options: those of the run. Of `strength` the loop reads whether it is given, in which case x is clean and gets
            noise up to the level of the first row. What else it and `start_step` say is in the rows, and seed, index,
            callback, progress, decode and out belong to whoever runs the loop.
        observed: whether someone looks at x0, and may change x, after a row.
        borrows: whether another run may have the memory once this one is closed.

    Attributes:
        guidance: what the options say about classifier-free guidance; its weights are those that the step reads.
        inpainting: the known region and its mask as the rows use them; None where the options give none.
        schedule: the rows that run, see row_schedule.
        differentiable: whether gradients go through the run.
        in_fresh_tensors: whether a transform or a recorder follows the run, which then serves it alone.
    """

    def __init__(
        self,
        rows: FirstRow,
        correct_x0: CorrectX0 | None,
        model: Model,
        x: Tensor | Sequence[int],
        options: RunOptions,
        *,
        observed: bool = False,
        borrows: bool = False,
    ) -> None:
        self._correct_x0, self._options, self._observed = correct_x0, options, observed
        self._predict = Predictor(model, options.model_dtype)
        self._place(x, options)
        table, first_row = rows(x, options.strength, options.start_step)
        self._table = table
        self._cached = model.of_run(table, first_row) if isinstance(model, Cached) else None
        if self._cached is not None:
            if transformed() or recording():
                raise ValueError("a cached model decides by values, which transforms and torch.compile keep hidden")
            self._predict.model = self._cached
        if options.strength is None and not isinstance(x, Tensor):
            warn_of_far_noise(table)
        self._level = None if options.strength is None else noise_level(table, first_row)
        draws_in_rows = options.noise is None and any(table.stochastic[first_row:])
        inpaints = options.mask is not None or options.known is not None
        self._draws = draws_in_rows or inpaints or options.strength is not None
        self._changes = observed or correct_x0 is not None or inpaints
        with ordinary_tensors():
            self.guidance = self.guidance_for(options)
            self._predict.guided = self.guidance.weights is not None
            self.schedule = row_schedule(table, self.guidance, first_row)
            if self.guidance.bending is not None:
                self.guidance.bending.check_rows(len(self.schedule))
            self._memory = memory = self._find_memory(options, borrows)
            self._source = None if options.noise is None else noise_source(options.noise, memory.state)
            self.inpainting = None
            if inpaints:
                mask, known = options.mask, options.known
                self.inpainting = Inpainting(mask, known, memory.state, table, memory.keys, self._backend)

    def _place(self, x: Tensor | Sequence[int], options: RunOptions) -> None:
        """Where the state lies, what it looks like and what computes it."""
        given = x if isinstance(x, Tensor) else None
        if options.device is not None:
            device = usable_device(options.device, or_meta=True)
        else:
            device = (self._predict if given is None else given).device or torch.device("cpu")
        self._device = device
        self._shape = checked_start(x)
        self.differentiable = (given is not None and given.requires_grad and torch.is_grad_enabled()) or transformed()
        self.in_fresh_tensors = self.differentiable or recording()
        double = given is not None and given.dtype == torch.float64
        self._dtype = torch.float64 if double else torch.float32
        self._backend = choose(options.backend, self._device, native=not (self.differentiable or double))

    def _find_memory(self, options: RunOptions, borrows: bool) -> Workspace | FreshTensors:
        guidance, weights = self.guidance, self.guidance.weights
        kind = Kind(
            id(self._table),
            self._shape,
            self._dtype,
            self._device,
            self._predict.dtype,
            weights is not None,
            guidance.one_weight,
            guidance.rescale,
            options.noise is None,
            self._changes,
            self._correct_x0 is not None,
            self._backend,
        )
        # What callbacks and correct_x0 were shown they may keep.
        if self.in_fresh_tensors:
            self._shares, self._keeps = False, not borrows
            return FreshTensors(kind, self._table, weights, self.differentiable)
        left = taken(kind) if borrows and not self._changes else None
        memory = Workspace(kind, self._table) if left is None else left
        self._shares = left is not None or (borrows and not self._changes and worth_sharing(kind, self._table))
        self._keeps = not borrows or self._shares
        if weights is not None and memory.weights is not None:
            memory.weights.copy_(weights)
            self.guidance = replace(guidance, weights=memory.weights)
        return memory

    @property
    def state(self) -> Tensor:
        """The state before the next row, and after the last one the sample."""
        return self._memory.state

    def guidance_for(self, options: RunOptions) -> GuidedRows:
        """The guidance that these options ask for, in a run of this shape and model."""
        keywords = options.model_kwargs is options.cond is options.uncond is None
        if keywords and options.guidance is options.guidance_interval is None and options.guidance_rescale == 0:
            return UNGUIDED
        like = torch.empty(self._shape[0], dtype=self._dtype, device=self._device)
        # A kernel would be hidden from whoever follows the run.
        backend = "reference" if self.in_fresh_tensors else self._backend
        return guidance_of(like, options, self._predict.known_dtype, backend=backend)

    def start(self, x: Tensor | Sequence[int], seed: Seed | None, index: Index) -> None:
        """The state before the first row: x itself, with noise where it is clean, or x_T drawn from the seed."""
        given = x if isinstance(x, Tensor) else None
        if seed is not None or self._draws or given is None:
            self._memory.renew_keys(seed, index)
        self._memory.start(given, self._level)

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
        check_strided("out", out)
        check_apart("out", out)
        if out.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError("out was made in inference mode, outside of which it cannot be written")
        if out.requires_grad and out.is_leaf and self.differentiable:
            raise ValueError("out requires gradients: it cannot be written in place")

    def ask(
        self, model_kwargs: Mapping[str, Any] | None, cond: Mapping[str, Any] | None, uncond: Mapping[str, Any] | None
    ) -> None:
        """Gives the model these keywords from now on; the guidance weight and all else stay."""
        options = self._options._replace(model_kwargs=model_kwargs, cond=cond, uncond=uncond)
        self.guidance = replace(self.guidance_for(options), weights=self._memory.weights)

    def check_stopped(self, step: Step, x0: Tensor) -> None:
        """Raises where what was shown after a row, or lent to the model, was replaced; `rows` does where it goes on."""
        if isinstance(self._memory, Workspace):
            self._memory.check_shown(step, x0)
            self._memory.check_lent()
        else:
            self._memory.check_shown(step)

    def warn_of_training(self) -> None:
        """Warns as construction does, for a model that has changed since."""
        self._predict.warn_of_training()

    def rows(self) -> Iterator[Step | None]:
        """Runs every row; yields after it, a Step where someone looks at it."""
        memory = self._memory
        for remembering in (self._cached, self.guidance.bending):
            if remembering is not None:
                remembering.begin()
        if not isinstance(memory, Workspace):
            return self._followed_rows(memory)
        return self._watched_rows(memory) if self._changes else self._plain_rows(memory)

    def result(self) -> Tensor:
        """The sample, once all rows have run, in storage of its own."""
        return self._memory.result(self._keeps)

    def close(self) -> None:
        """Once at the end of a run that did not fail: another one may have the memory."""
        if self._shares and isinstance(self._memory, Workspace):
            leave(self._memory)

    def _bending(self) -> tuple[Bending | None, int, int]:
        """What combines the halves of guided rows in place of the step, the channels of the state, the first row."""
        return self.guidance.bending, self._shape[1] if len(self._shape) > 1 else 0, self.schedule[0][0]

    def _plain_rows(self, memory: Workspace) -> Iterator[None]:
        """The rows of a run in place whose state nobody looks at or changes: the step makes the next input too.

        A robot's whole run is ten of these, so a row is two Python frames: this one and the model's.
        """
        table, predict, source = self._table, self._predict, self._source
        bending, channels, first = self._bending()
        model, keeps_entry, last = predict.model, table.keeps_entry, len(table) - 1
        memory.input.fill(float(table.e[self.schedule[0][0]]))
        memory.renew_times()
        inputs, times, needed = memory.input.views, memory.times, memory.input.needed
        keywords = self.guidance.conditional, self.guidance.both
        threads, version_of_times = torch.get_num_threads(), times[False][0]._version
        # A graph runs the rows more than once, from the same turn.
        turns = cycle(memory.plans)
        for k, _, guided, next_guided, _ in self.schedule:
            # The call and the checks of a Predictor, without its frame.
            x = inputs[guided]
            version = x._version
            m = model(x, times[guided][k], **keywords[guided])
            if type(m) is not Tensor or x._version != version or x.requires_grad or predict.guided:
                m = predict.checked(m, x, version)
            if bending is not None and guided:
                m = bending(m, channels, k - first)
            z = source(k) if source is not None and table.stochastic[k] else None
            plan = next(turns)
            plain, writes_input = plan.plain[k], k < last and needed[next_guided]
            if plain is None or z is not None or not plain(m, keeps_entry[k], writes_input, threads):
                plan(m, k, z, keeps_entry[k], writes_input)
            yield None
        predict.check_times(times[False][0], version_of_times)
        memory.check_lent()

    def _watched_rows(self, memory: Workspace) -> Iterator[Step | None]:
        """The rows of a run in place whose x0 or state is looked at, corrected or painted over."""
        table, predict, source = self._table, self._predict, self._source
        bending, channels, first = self._bending()
        correct, inpainting, observed = self._correct_x0, self.inpainting, self._observed
        model, keywords, scales = predict.model, (self.guidance.conditional, self.guidance.both), table.e.tolist()
        memory.renew_times()
        look, state = memory.look, memory.state
        fill, inputs, times = memory.input.fill, memory.input.views, memory.times
        threads, version_of_times = torch.get_num_threads, times[False][0]._version
        turns = cycle(memory.plans)
        for k, t, guided, _, level in self.schedule:
            fill(scales[k])
            # As in _plain_rows.
            x = inputs[guided]
            version = x._version
            m = model(x, times[guided][k], **keywords[guided])
            if type(m) is not Tensor or x._version != version or x.requires_grad or predict.guided:
                m = predict.checked(m, x, version)
            if bending is not None and guided:
                m = bending(m, channels, k - first)
            z = source(k) if source is not None and table.stochastic[k] else None
            plan = next(turns)
            entry: Tensor = plan.x0_out  # type: ignore[assignment]  # there is one wherever x may change after a row
            x0 = entry if look is None else look(m, k)
            plain = plan.plain[k]
            if plain is None or z is not None or not plain(m, True, False, threads()):
                plan(m, k, z)
            if correct is not None:
                memory.correct(correct, x0, entry, k)
            if inpainting is not None:
                inpainting.apply(state, k)
            if not observed:
                yield None
                continue
            # Autograd cannot see kernels write, and shall not use what was in these buffers.
            mark_written(state)
            mark_written(x0)
            step = Step(k, t, state, x0, *level)
            yield step
            memory.check_shown(step, x0)
        predict.check_times(times[False][0], version_of_times)
        memory.check_lent()

    def _followed_rows(self, memory: FreshTensors) -> Iterator[Step]:
        """The rows of a run that gradients go through, or that a transform or a recorder follows."""
        table, predict, source = self._table, self._predict, self._source
        bending, channels, first = self._bending()
        correct, inpainting = self._correct_x0, self.inpainting
        keywords = self.guidance.conditional, self.guidance.both
        history: list[Tensor] = []
        for k, t, guided, _, level in self.schedule:
            x, time = memory.model_input(k, guided)
            m = predict(x, time, keywords[guided])
            if bending is not None and guided:
                m = bending(m, channels, k - first)
            seen = memory.look(m, k)
            entry = memory.step(m, k, source(k) if source is not None and table.stochastic[k] else None, history)
            x0 = entry if seen is None else seen
            if correct is not None:
                x0 = memory.correct(correct, x0, k)
                entry = memory.entry(entry, x0, k)
            history = [entry, *history][: table.history]
            if inpainting is not None:
                memory.paint(inpainting, k)
            step = Step(k, t, memory.state, x0, *level)
            yield step
            memory.check_shown(step)
