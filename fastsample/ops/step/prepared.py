"""The step with everything checked beforehand: what a loop calls row after row, and the public op once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsample.ops.address import check_dense, check_readable
from fastsample.ops.backend import choose
from fastsample.ops.checks import (
    check_history,
    check_like,
    check_log_prob,
    check_memory,
    check_output,
    check_rescale,
    check_state,
    check_variance,
    checked_noise,
    checked_rows,
    guidance_weights,
)
from fastsample.ops.dtypes import DTYPE_CODES
from fastsample.ops.memory import fresh_like, mark_written, ordinary_tensors
from fastsample.ops.noise.keys import Index, Seed, sample_keys
from fastsample.ops.step.launch import Layouts, ShortCut, launch
from fastsample.ops.step.log_prob import log_prob_of_sums
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.reference import next_scale, step_reference
from fastsample.ops.tracing import differentiable


class StepPlan:
    """`step` with everything that stays the same from row to row fixed and checked once: what a loop calls.

    Keeps the addresses of its tensors: their storage must not move, and an x or a history that is not contiguous is
    read as it was when the plan was made. The caller has checked that x is a state, that rows exist and what overlaps.

    Kernels of a GPU read `rows` on x's device, and the host does not: what any row of the table needs must be there,
    and a row that does not exist makes NaN of its sample. Rows from the CPU are uploaded at every call, keys once.

    Args:
        operands: see Operands.
        backend: one that can run.
        short_cuts: whether to make `plain`, which pays where rows are run more than once.

    Attributes:
        x0_out: that of the operands.
        plain: for each row that needs nothing beside the model's output a short cut to the kernel,
            plain(m, keep_x0, write_input, threads), which is False, and has done nothing, where m has to be looked at
            more closely; else None.
    """

    def __init__(self, operands: Operands, backend: str = "cpu", *, short_cuts: bool = True) -> None:
        _check(operands)
        self._operands, table, rows = operands, operands.table, operands.rows
        self.x0_out, self._out = operands.x0_out, operands.out
        self._native = backend != "reference"
        self._lacks_history = table.history > len(operands.history)
        # Where rows lie on a GPU, or kernels read them as if they did: which rows a call visits is not known here.
        self._rows_on_device = rows is not None and (backend in ("cuda", "triton") or not rows.is_cpu)
        if self._rows_on_device:
            self._any_row = any(table.stochastic), any(table.learned)
        self.plain: Sequence[ShortCut | None] = (None,) * len(table)
        if self._native:
            self._prepare(backend)
            in_place = self._target is not None and self._target is self._out
            if short_cuts and rows is None and in_place and operands.log_prob_out is None:
                self._make_short_cuts()

    def _prepare(self, backend: str) -> None:
        # The kernel writes packed memory of its own dtypes; any other target gets a stand-in that is copied over.
        self._stand_ins: dict[str, tuple[Tensor, Tensor]] = {}
        self._staging: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        given = self._operands
        x, rows = given.x.contiguous().resolve_neg(), given.rows
        self._is_cpu, self._index = x.is_cpu, x.get_device()
        self._layouts = _accepted_layouts(x, guided=given.guidance is not None)
        x0 = self._written("x0", given.x0_out)
        # Where x0 replaces the history it was made from, both must be the very same memory.
        history = [
            x0 if x0 is not None and one is given.x0_out else one.contiguous().resolve_neg() for one in given.history
        ]
        if "x0" in self._stand_ins:
            target, stand_in = self._stand_ins["x0"]
            stand_in.copy_(target)
        self._upload: tuple[Tensor, Tensor, bool] | None = None
        if rows is not None and rows.device != x.device:
            # Pinned memory would be read later on, when its owner may have changed it.
            self._upload = torch.empty(rows.shape, dtype=rows.dtype, device=x.device), rows, not rows.is_pinned()
            rows = self._upload[0]
        input_out = self._written("input", given.input_out)
        self._target = self._written("out", given.out)
        keys = None if given.keys is None else given.keys.to(x.device)
        # Kept here, since kernels know addresses alone. Spelt out: _replace would take four times as long.
        self._read = Operands(
            *(x, given.table, keys, given.guidance, given.one_guidance, given.rescale),
            *(history, rows, self._target, x0, input_out, given.log_prob_out),
        )
        self._launch = launch(backend, self._read)
        self._kernel = self._launch.kernel
        if given.log_prob_out is not None and self._launch.log_prob_sums is None:
            raise ValueError(f"backend {backend!r} leaves nothing for log_prob_out: use backend='reference'")

    def _make_short_cuts(self) -> None:
        if (make := self._launch.short_cuts) is None or self._stand_ins:
            return
        table, learned, known = self._operands.table, self._operands.table.learned, len(self._operands.history)
        lacks_keys = self._operands.keys is None
        # Those in which nothing but the model's output is left to look at.
        needs = enumerate(zip(table.stochastic, table.reads, strict=True))
        rows = [row for row, (noisy, reads) in needs if reads <= known and not (noisy and lacks_keys)]
        short_cuts = make(self._layouts, [row for row in rows if not learned[row]])
        if any(learned):
            size = self._read.x.numel() // self._read.x.shape[0]
            with_variance = {shape: layout for shape, layout in self._layouts.items() if layout[0] == 2 * size}
            short_cuts |= make(with_variance, [row for row in rows if learned[row]])
        self.plain = [*map(short_cuts.get, range(len(learned)))]

    def _written(self, name: str, target: Tensor | None) -> Tensor | None:
        """What a kernel writes for this target."""
        if target is None or (target.is_contiguous() and target.dtype in DTYPE_CODES and not target.is_neg()):
            return target
        dtype = target.dtype if target.dtype in DTYPE_CODES else torch.float32
        stand_in = torch.empty(target.shape, dtype=dtype, device=target.device)
        self._stand_ins[name] = target, stand_in
        return stand_in

    def __call__(
        self, m: Tensor, row: int, noise: Tensor | None = None, keep_x0: bool = True, write_input: bool = True
    ) -> Tensor:
        """x' of this row; m with twice the batch where it is guided. x0_out and input_out can be left as they are."""
        plain = self.plain[row]
        if noise is None and plain is not None and plain(m, keep_x0, write_input, torch.get_num_threads()):
            return self._out  # type: ignore[return-value]
        operands = self._operands
        if operands.rows is None:
            stochastic, learned = operands.table.stochastic[row], operands.table.learned[row]
        else:
            stochastic, learned = self._of_rows(row)
        if self._lacks_history:
            self._check_history(row)
        if not self._native:
            return self._reference(m, row, noise if stochastic else None, keep_x0, write_input)
        try:
            layout = self._layouts.get(m.shape)
            if layout is None or not (m.is_cpu if self._is_cpu else m.get_device() == self._index):
                check_output(m, operands.x, guided=operands.guidance is not None)
                raise AssertionError("an output that passes the check has a layout")
            if learned:
                check_variance(m, operands.x)
            if m.dtype not in DTYPE_CODES or not m.is_contiguous() or m.is_neg():
                m = self._stage(m)
        except RuntimeError:  # tensors without memory, or without a shape, have no such attributes
            check_dense("model_output", m)
            raise
        if stochastic and (noise is not None or operands.keys is None):
            noise = checked_noise(noise, operands.x).contiguous().resolve_neg()
        else:
            noise = None
        out = self._out
        if out is None:
            out = fresh_like(self._read.x)
        if self._upload is not None:
            rows, source, at_once = self._upload
            rows.copy_(source, non_blocking=at_once)
        self._kernel(row, m, *layout, noise, out if self._target is None else self._target, keep_x0, write_input)
        if (sums := self._launch.log_prob_sums) is not None:
            size = self._read.x[0].numel()
            log_prob = log_prob_of_sums(sums, size, operands.table, row, self._read.rows)
            operands.log_prob_out.copy_(log_prob)  # type: ignore[union-attr]  # there are sums where it is wanted
        if self._stand_ins:
            written = {"out": True, "x0": keep_x0, "input": write_input}
            for name, (target, stand_in) in self._stand_ins.items():
                if written[name]:
                    target.copy_(stand_in)
        return out

    def _of_rows(self, row: int) -> tuple[bool, bool]:
        """Whether any row of this call adds noise, and whether any reads a learned variance."""
        if self._rows_on_device:
            return self._any_row
        visited, table = self._visited(row), self._operands.table
        return any(table.stochastic[k] for k in visited), any(table.learned[k] for k in visited)

    def _check_history(self, row: int) -> None:
        reads = self._operands.table.reads
        for k in self._visited(row):
            if len(self._operands.history) < reads[k]:
                raise ValueError(f"row {k} needs the entries of {reads[k]} earlier row(s): give history=")

    def _visited(self, row: int) -> Sequence[int]:
        operands = self._operands
        return range(len(operands.table)) if self._rows_on_device else visited_rows(operands.rows, row)

    def _stage(self, m: Tensor) -> Tensor:
        # Kept from row to row: a model with strided or float64 outputs must not cost an allocation each time. All live
        # as long as the plan: a CUDA graph that was captured over one shape outlives calls with another.
        check_output(m, self._operands.x, guided=self._operands.guidance is not None)
        check_dense("model_output", m)
        dtype = m.dtype if m.dtype in DTYPE_CODES else torch.float32
        staging = self._staging.get((m.shape, dtype))
        if staging is None:
            with ordinary_tensors():
                staging = torch.empty(m.shape, dtype=dtype, device=m.device)
            self._staging[m.shape, dtype] = staging
        return staging.copy_(m)

    def _reference(self, m: Tensor, row: int, noise: Tensor | None, keep_x0: bool, write_input: bool) -> Tensor:
        check_readable("model_output", m)
        o = self._operands
        rows = row if o.rows is None else o.rows
        given = o.x, m, o.table, rows, noise, o.keys, o.guidance, o.rescale, o.history
        result, x0, log_prob = step_reference(*given, with_log_prob=o.log_prob_out is not None)
        if o.log_prob_out is not None:
            o.log_prob_out.copy_(log_prob)  # type: ignore[arg-type]  # made where it is wanted
        if o.x0_out is not None and keep_x0:
            o.x0_out.copy_(x0)
        if o.input_out is not None and write_input:
            scale = next_scale(o.table, rows, result)
            for half in o.input_out.split(o.x.shape[0]):
                half.copy_(result * scale)
        return result if o.out is None else o.out.copy_(result)


def _check(o: Operands) -> None:
    """Raises where a tensor does not fit x."""
    for name, tensor in (("out", o.out), ("x0_out", o.x0_out)):
        if tensor is not None:
            check_like(name, tensor, o.x, dtype=o.x.dtype)
    for i, one in enumerate(o.history):
        check_like(f"history[{i}]", one, o.x, dtype=o.x.dtype)
    if o.log_prob_out is not None:
        check_log_prob(o.log_prob_out, o.x)
    if o.input_out is not None:
        check_like("input_out", o.input_out, o.x, dtype=None, copies=2)
        if not o.input_out.is_floating_point():
            raise TypeError(f"input_out must be floating point, got {o.input_out.dtype}")


def _accepted_layouts(x: Tensor, *, guided: bool) -> Layouts:
    """The layout of every shape that the model's output may have."""
    batch, *rest = x.shape
    size = x.numel() // batch
    layouts = {}
    for twice in (False, True) if guided else (False,):
        count = 2 * batch if twice else batch
        layouts[torch.Size((count, *rest))] = size, twice
        if rest:
            layouts[torch.Size((count, 2 * rest[0], *rest[1:]))] = 2 * size, twice
    return layouts


def visited_rows(rows: Tensor | None, row: int) -> Sequence[int]:
    """The rows that samples are at: their own, which are read, or the one they share."""
    return (row,) if rows is None else sorted(set(rows.tolist()))


def step_once(
    given: Operands,
    model_output: Tensor,
    row: int | Tensor,
    noise: Tensor | None,
    backend: str | None,
    seed: Seed | None = None,
    index: Index = 0,
    guidance: float | Sequence[float] | Tensor | None = None,
) -> Tensor:
    """`step`, checked, planned and run once.

    `given` are the operands but for what a caller may give in several forms: row, seed and index, unless there are keys
    already, and guidance.
    """
    x, table, keys, history = given.x, given.table, given.keys, given.history
    check_state(x)
    rows, row = checked_rows(row, table, x)
    visited = range(len(table)) if rows is not None and not rows.is_cpu else visited_rows(rows, row)
    noisy = [k for k in visited if table.stochastic[k]]
    if noisy and noise is not None and not (seed is None and keys is None):
        raise ValueError(f"row {noisy[0]} adds noise once: give noise= or seed=, not both")
    if given.log_prob_out is not None and (rows is None or rows.is_cpu) and len(noisy) < len(visited):
        silent = next(k for k in visited if not table.stochastic[k])
        raise ValueError(f"row {silent} draws nothing, so that it has no density: leave log_prob_out out there")
    check_history(history)
    outputs = {name: getattr(given, name) for name in ("out", "x0_out", "input_out", "log_prob_out")}
    if any(output is not None for output in outputs.values()):
        inputs = {"x": x, "model_output": model_output, "noise": noise}
        check_memory({**inputs, **{f"history[{i}]": one for i, one in enumerate(history)}}, outputs)
    weights = None if guidance is None else guidance_weights(guidance, x)
    if weights is not None and model_output.shape[0] != 2 * x.shape[0]:
        raise ValueError(
            f"under guidance model_output has the unconditional and the conditional half, {2 * x.shape[0]} samples; "
            f"got shape {tuple(model_output.shape)}"
        )
    check_rescale(given.rescale, guided=weights is not None)
    native = x.dtype is torch.float32 and not differentiable(
        x, model_output, noise, weights, seed, index, *history, *outputs.values()
    )
    chosen = choose(backend, x.device, native=native)
    draws = bool(noisy) and noise is None
    if keys is None and (draws or seed is not None or type(index) is not int or index != 0):
        # Also where no row reads them, so that what is no seed or place is refused; but nothing is drawn for that.
        keys = sample_keys(seed if draws or seed is not None else 0, index, x.shape[0], x.device)
    operands = Operands(x, table, keys, weights, None, given.rescale, history, rows, **outputs)
    result = StepPlan(operands, chosen, short_cuts=False)(model_output, row, noise)
    for written in outputs.values():
        if written is not None:
            mark_written(written)
    return result
