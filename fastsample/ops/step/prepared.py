"""The step with everything checked beforehand: what a loop calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsample.ops.address import address, check_dense, check_readable
from fastsample.ops.backend import cpu_module
from fastsample.ops.checks import check_like, check_output, check_variance, checked_noise
from fastsample.ops.memory import fresh_like
from fastsample.ops.step.launch import DTYPE_CODES, Operands, launch
from fastsample.ops.step.reference import next_scale, step_reference
from fastsample.tables import Table


class StepPlan:
    """`step` with everything that stays the same from row to row fixed and checked once: what a loop calls.

    Args are those of `step`; `keys` is an int64 tensor with one key per sample, `guidance` a float tensor with one
    weight per sample, `one_guidance` whether they are and stay equal (None: whether they are now), `rows` an int64
    tensor that is read at every call or None, `backend` one that can run. Keeps the addresses of its tensors: their
    storage must not move, and an x or a history that is not contiguous is read as it was when
    the plan was made. That x is a state, that rows exist and what overlaps, the caller has checked.

    Kernels of a GPU read `rows` on x's device, and the host does not: what any row of the table needs must be there,
    and a row that does not exist makes NaN of its sample. Rows from the CPU are uploaded at every call, keys once.

    Attributes:
        x0_out: as given.
        plain: for each row that needs nothing beside the model's output a short cut to the kernel,
            plain(m, keep_x0, write_input, threads), which is False, and has done nothing, where m has to be looked at
            more closely; else None.
    """

    def __init__(
        self,
        x: Tensor,
        table: Table,
        *,
        keys: Tensor | None = None,
        guidance: Tensor | None = None,
        one_guidance: bool | None = None,
        rescale: float = 0.0,
        history: Sequence[Tensor] = (),
        rows: Tensor | None = None,
        out: Tensor | None = None,
        x0_out: Tensor | None = None,
        input_out: Tensor | None = None,
        backend: str = "cpu",
    ) -> None:
        for name, tensor in (("out", out), ("x0_out", x0_out)):
            if tensor is not None:
                check_like(name, tensor, x, dtype=x.dtype)
        for i, one in enumerate(history):
            check_like(f"history[{i}]", one, x, dtype=x.dtype)
        if input_out is not None:
            check_like("input_out", input_out, x, dtype=None, copies=2)
            if not input_out.is_floating_point():
                raise TypeError(f"input_out must be floating point, got {input_out.dtype}")
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance_rescale must lie in [0, 1], got {rescale}")
        self.x0_out = x0_out
        self._x, self._table, self._keys, self._rows = x, table, keys, rows
        self._guidance, self._rescale, self._history = guidance, rescale, tuple(history)
        self._out, self._input_out = out, input_out
        self._native = backend != "reference"
        self._lacks_history = table.history > len(self._history)
        # Where rows lie on a GPU, or kernels read them as if they did: which rows a call visits is not known here.
        self._blind = rows is not None and (backend in ("cuda", "triton") or not rows.is_cpu)
        if self._blind:
            self._any_row = any(table.stochastic), any(table.learned)
        self.plain: Sequence[Callable[..., bool] | None] = (None,) * len(table)
        if self._native:
            self._prepare(backend, one_guidance)

    def _prepare(self, backend: str, one_guidance: bool | None) -> None:
        # The kernel writes packed memory of its own dtypes; any other target gets a stand-in that is copied over.
        self._stand_ins: dict[str, tuple[Tensor, Tensor]] = {}
        self._staging: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        x = self._x = self._x.contiguous().resolve_neg()
        self._is_cpu, self._index = x.is_cpu, x.get_device()
        self._layouts = self._accepted_layouts(x.numel() // x.shape[0])
        x0 = self._written("x0", self.x0_out)
        # Where x0 replaces the history it was made from, both must be the very same memory.
        self._history = tuple(one if one is self.x0_out else one.contiguous().resolve_neg() for one in self._history)
        histories = [x0 if one is self.x0_out else one for one in self._history]
        if "x0" in self._stand_ins:
            target, stand_in = self._stand_ins["x0"]
            stand_in.copy_(target)
        if self._keys is not None:
            self._keys = self._keys.to(x.device)
        rows = self._rows
        self._upload: tuple[Tensor, Tensor, bool] | None = None
        if rows is not None and rows.device != x.device:
            # Pinned memory would be read later on, when its owner may have changed it.
            self._upload = torch.empty(rows.shape, dtype=rows.dtype, device=x.device), rows, not rows.is_pinned()
        self._operands = Operands(
            self._table,
            rows if self._upload is None else self._upload[0],
            x,
            self._keys,
            self._guidance,
            one_guidance,
            self._rescale,
            h1=histories[0] if histories else None,
            h2=histories[1] if len(histories) > 1 else None,
            x0_out=x0,
            input_out=self._written("input", self._input_out),
        )
        self._target = self._written("out", self._out)
        self._out_address = address("out", self._target)
        self._launch = launch(backend, self._operands)
        self._kernel, self._last, self._takes_tensors, _ = self._launch
        if self._out is not None and self._target is self._out and backend == "cpu" and rows is None:
            layouts = [(shape, *layout) for shape, layout in self._layouts.items()]
            outputs = cpu_module().PlainOutputs(Tensor, layouts, list(DTYPE_CODES))
            plain = functools.partial(self._kernel.plain, outputs, self._out_address)  # type: ignore[attr-defined]
            self.plain = [
                functools.partial(plain, row) if self._is_plain(row) else None for row in range(len(self._table))
            ]

    def _is_plain(self, row: int) -> bool:
        """Whether nothing but the model's output is left to look at in this row."""
        table, lacks_noise = self._table, self._table.stochastic[row] and self._keys is None
        return not (lacks_noise or table.learned[row] or table.reads[row] > len(self._history) or self._stand_ins)

    def _accepted_layouts(self, size: int) -> dict[torch.Size, tuple[int, bool]]:
        """(elements from sample to sample, guided) of every shape that the model's output may have."""
        batch, *rest = self._x.shape
        layouts = {}
        for guided in (False, True) if self._guidance is not None else (False,):
            count = 2 * batch if guided else batch
            layouts[torch.Size((count, *rest))] = size, guided
            if rest:
                layouts[torch.Size((count, 2 * rest[0], *rest[1:]))] = 2 * size, guided
        return layouts

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
        if noise is None and plain is not None and plain(m, keep_x0, write_input, self._last()):
            return self._out  # type: ignore[return-value]
        table = self._table
        if self._rows is None:
            stochastic, learned = table.stochastic[row], table.learned[row]
        elif self._blind:
            stochastic, learned = self._any_row
        else:
            visited = visited_rows(self._rows, row)
            stochastic, learned = (any(flags[k] for k in visited) for flags in (table.stochastic, table.learned))
        if self._lacks_history:
            self._check_history(row)
        if not self._native:
            return self._reference(m, row, noise, stochastic, keep_x0, write_input)
        try:
            layout = self._layouts.get(m.shape)
            if layout is None or not (m.is_cpu if self._is_cpu else m.get_device() == self._index):
                check_output(m, self._x, guided=self._guidance is not None)
                raise AssertionError("an output that passes the check has a layout")
            stride, guided = layout
            if learned:
                check_variance(m, self._x)
            code = DTYPE_CODES.get(m.dtype)
            if code is None or not m.is_contiguous() or m.is_neg():
                m = self._stage(m)
                code = DTYPE_CODES[m.dtype]
            m_address = m.data_ptr()
        except RuntimeError:  # tensors without memory, or without a shape, have no such attributes
            check_dense("model_output", m)
            raise
        if not m_address:
            check_dense("model_output", m)
        noise_address = 0
        if stochastic and (noise is not None or self._keys is None):
            noise = checked_noise(noise, self._x).contiguous().resolve_neg()
            noise_address = address("noise", noise)
        out, out_address = self._out, self._out_address
        if out is None:
            out = fresh_like(self._x)
            out_address = address("out", out)
        if self._upload is not None:
            target, source, at_once = self._upload
            target.copy_(source, non_blocking=at_once)
        if self._takes_tensors:
            target = out if self._target is None else self._target
            z = noise if noise_address else None
            self._kernel(row, m, stride, guided, z, target, keep_x0, write_input)
        else:
            self._kernel(
                row,
                m_address,
                stride,
                code,
                guided,
                noise_address,
                out_address,
                keep_x0,
                write_input,
                self._last(),
            )
        if self._stand_ins:
            written = {"out": True, "x0": keep_x0, "input": write_input}
            for name, (target, stand_in) in self._stand_ins.items():
                if written[name]:
                    target.copy_(stand_in)
        return out

    def _check_history(self, row: int) -> None:
        for k in self._visited(row):
            if len(self._history) < self._table.reads[k]:
                raise ValueError(f"row {k} needs the x0 of {self._table.reads[k]} earlier row(s): give history=")

    def _visited(self, row: int) -> Sequence[int]:
        return range(len(self._table)) if self._blind else visited_rows(self._rows, row)

    def _stage(self, m: Tensor) -> Tensor:
        # Kept from row to row: a model with strided or float64 outputs must not cost an allocation each time. All live
        # as long as the plan: a CUDA graph that was captured over one shape outlives calls with another.
        check_output(m, self._x, guided=self._guidance is not None)
        check_dense("model_output", m)
        dtype = m.dtype if m.dtype in DTYPE_CODES else torch.float32
        staging = self._staging.get((m.shape, dtype))
        if staging is None:
            staging = self._staging[m.shape, dtype] = torch.empty(m.shape, dtype=dtype, device=m.device)
        return staging.copy_(m)

    def _reference(
        self, m: Tensor, row: int, noise: Tensor | None, stochastic: bool, keep_x0: bool, write_input: bool
    ) -> Tensor:
        check_readable("model_output", m)
        rows = row if self._rows is None else self._rows
        z = noise if stochastic else None
        result, x0 = step_reference(
            self._x, m, self._table, rows, z, self._keys, self._guidance, self._rescale, self._history
        )
        if self.x0_out is not None and keep_x0:
            self.x0_out.copy_(x0)
        if self._input_out is not None and write_input:
            batch = self._x.shape[0]
            scale = next_scale(self._table, rows, result)
            for half in self._input_out.split(batch):
                half.copy_(result * scale)
        return result if self._out is None else self._out.copy_(result)


def visited_rows(rows: Tensor | None, row: int) -> Sequence[int]:
    """The rows that samples are at: their own, which are read, or the one they share."""
    return (row,) if rows is None else sorted(set(rows.tolist()))
