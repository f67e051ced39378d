"""The sampling step: one pass over memory for one row of a sampler's table."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from fastsample.ops.backend import _cpu, choose, fresh, mark_written
from fastsample.ops.noise import STEP, Seed, checked_shape, randn, sample_seeds
from fastsample.tables import Table

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType in csrc/cpu/kernels.h


def step(
    x: Tensor,
    model_output: Tensor,
    table: Table,
    row: int,
    *,
    noise: Tensor | None = None,
    seed: Seed | None = None,
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    input_out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One row of a table applied to a batch; the columns are those of fastsample.Table.

        x0 = clamp(p*x + q*m, -limit, limit)
        x' = a*x + b*x0 + d*m + s*z

    One pass: x and m are read once and x' is written once, 12 bytes an element in float32 and 10 with a half-precision
    m; x0_out and input_out add their own size. Arithmetic is float32 whatever the dtype of m. An operand whose
    coefficient is 0 is not read.

    Args:
        x: the state, shape (B, ...), float32; float64 with the reference backend. Any strides.
        model_output: m, of x's shape, or (B, 2C, ...) where x is (B, C, ...): the second half is ignored. Any floating
            dtype; float32, float16 and bfloat16 are converted in registers.
        table: the sampler's coefficients.
        row: which row, 0 (the noisiest) to len(table) - 1; negative rows count from the end.
        noise: z, of x's shape and dtype. Not read where s = 0.
        seed: instead of `noise`, z = randn(x.shape, seed=seed, step=row, stream=1), drawn inside the pass.
        out: receives x'; may be x. Otherwise x' is a fresh tensor.
        x0_out: receives x0; of x's dtype.
        input_out: receives x' too, in any floating dtype: the next model input.
        backend: see fastsample.backends(). Gradients and float64 are served by the reference alone.

    Returns:
        x' (`out` where given).

    Raises:
        ValueError: for a wrong shape, device or row, and where s > 0 unless exactly one of noise and seed is given.
        TypeError: for a dtype that does not fit. Nothing is written before.

    Example:
        >>> table = Table([500], p=1.0, q=-1.0, b=0.5, limit=1.0)
        >>> step(torch.full((1, 3), 4.0), torch.zeros(1, 3), table, 0)
        tensor([[0.5000, 0.5000, 0.5000]])
    """
    for name, tensor in (("x", x), ("model_output", model_output)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not isinstance(table, Table):
        raise TypeError(f"table must be a fastsample.Table, got {type(table).__name__}")
    if not -len(table) <= operator.index(row) < len(table):
        raise ValueError(f"row {row} is outside a table of {len(table)} rows")
    row %= len(table)
    if table.stochastic[row] and (noise is None) == (seed is None):
        raise ValueError(f"row {row} adds noise: give exactly one of noise= and seed=")
    _check_state(x)
    outputs = {"out": out, "x0_out": x0_out, "input_out": input_out}
    _check_memory({"x": x, "model_output": model_output, "noise": noise}, outputs)
    differentiable = torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (x, model_output, noise)
    )
    chosen = choose(backend, x.device, native=x.dtype is torch.float32 and not differentiable)
    seeds = None if seed is None else sample_seeds(seed, len(x))
    plan = StepPlan(x, table, seeds=seeds, out=out, x0_out=x0_out, input_out=input_out, backend=chosen)
    result = plan(model_output, row, noise)
    for written in outputs.values():
        if written is not None:
            mark_written(written)
    return result


class StepPlan:
    """`step` with everything but the model's output, the row and the noise fixed and checked once: what a loop calls.

    Args are those of `step`; `seeds` is an int64 tensor with one seed per sample, `backend` one that can run. Keeps the
    addresses of its tensors: their storage must not move. That x is a state, and what overlaps, the caller has checked.
    """

    def __init__(
        self,
        x: Tensor,
        table: Table,
        *,
        seeds: Tensor | None,
        out: Tensor | None,
        x0_out: Tensor | None,
        input_out: Tensor | None,
        backend: str,
    ) -> None:
        for name, tensor in (("out", out), ("x0_out", x0_out), ("input_out", input_out)):
            if tensor is not None:
                _check_like(name, tensor, x, dtype=None if name == "input_out" else x.dtype)
        if input_out is not None and not input_out.is_floating_point():
            raise TypeError(f"input_out must be floating point, got {input_out.dtype}")
        self._x, self._table, self._seeds = x, table, seeds
        self._out, self._x0_out, self._input_out = out, x0_out, input_out
        self._native = backend == "cpu"
        self._shape = x.shape
        self._doubled = _doubled(x.shape)
        self._staging: Tensor | None = None
        if self._native:
            self._prepare()

    def _prepare(self) -> None:
        # The kernel writes packed memory of its own dtypes; any other target gets a stand-in that is copied over.
        self._stand_ins: list[tuple[Tensor, Tensor]] = []
        self._x = self._x.contiguous().resolve_neg()
        self._batch = self._shape[0]
        self._size = self._x.numel() // self._batch
        self._seeds_address = 0 if self._seeds is None else self._seeds.data_ptr()
        self._x0_address = self._address(self._x0_out)
        self._input_address = self._address(self._input_out)
        self._input_code = 0 if self._input_out is None else _DTYPE_CODES.get(self._input_out.dtype, 0)
        self._out_address = self._address(self._out)
        self._x_address = self._x.data_ptr()

    def _address(self, target: Tensor | None) -> int:
        if target is None:
            return 0
        if target.is_contiguous() and target.dtype in _DTYPE_CODES:
            return target.data_ptr()
        dtype = target.dtype if target.dtype in _DTYPE_CODES else torch.float32
        stand_in = torch.empty(target.shape, dtype=dtype, device=target.device)
        self._stand_ins.append((target, stand_in))
        return stand_in.data_ptr()

    def __call__(self, m: Tensor, row: int, noise: Tensor | None = None) -> Tensor:
        if not self._native:
            return self._reference(m, row, noise)
        shape = m.shape
        stride = self._size if shape == self._shape else 2 * self._size
        if (stride != self._size and shape != self._doubled) or not m.is_cpu:
            _check_output(m, self._x)
        code = _DTYPE_CODES.get(m.dtype)
        if code is None or not m.is_contiguous() or m.is_neg():
            m = self._stage(m)
            code = _DTYPE_CODES[m.dtype]
        noise_address = 0
        if self._table.stochastic[row] and (noise is not None or self._seeds is None):
            noise = _checked_noise(noise, self._x).contiguous().resolve_neg()
            noise_address = noise.data_ptr()
        out, address = self._out, self._out_address
        if out is None:
            out = fresh(self._shape, torch.float32, self._x.device)
            address = out.data_ptr()
        _cpu.step(
            self._table.packed_address,
            row,
            self._batch,
            self._size,
            self._x_address,
            m.data_ptr(),
            stride,
            code,
            noise_address,
            self._seeds_address,
            row,  # as the step of the noise counter
            address,
            self._x0_address,
            self._input_address,
            self._input_code,
            torch.get_num_threads(),
        )
        for target, stand_in in self._stand_ins:
            target.copy_(stand_in)
        return out

    def _stage(self, m: Tensor) -> Tensor:
        # Kept from row to row: a model with strided or float64 outputs must not cost an allocation each time.
        _check_output(m, self._x)
        dtype = m.dtype if m.dtype in _DTYPE_CODES else torch.float32
        if self._staging is None or self._staging.shape != m.shape or self._staging.dtype != dtype:
            self._staging = torch.empty(m.shape, dtype=dtype, device=m.device)
        return self._staging.copy_(m)

    def _reference(self, m: Tensor, row: int, noise: Tensor | None) -> Tensor:
        result, x0 = step_reference(self._x, m, self._table, row, noise, self._seeds)
        if self._x0_out is not None:
            self._x0_out.copy_(x0)
        if self._input_out is not None:
            self._input_out.copy_(result)
        return result if self._out is None else self._out.copy_(result)


def step_reference(
    x: Tensor, m: Tensor, table: Table, row: int, z: Tensor | None = None, seeds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x', x0) of one row in plain torch: the specification. Differentiable; computes in x's dtype."""
    _check_output(m, x)
    if m.shape != x.shape:
        m = m[:, : x.shape[1]]
    m = m.to(x.dtype)
    if table.stochastic[row]:
        if z is None and seeds is not None:
            z = randn(x.shape, seed=seeds, step=row, stream=STEP, device=x.device).to(x.dtype)
        z = _checked_noise(z, x)
    p, q, a, b, d, s = (float(getattr(table, name)[row]) for name in "pqabds")
    limit = float(table.limit[row])
    x0 = _sum((p, x), (q, m))
    if math.isinf(limit):
        # Folded before rounding: at high noise p is in the thousands and x0 would lose what x' still has.
        result = _sum((b * q + d, m), (a + b * p, x), (s, z))
    else:
        x0 = x0.clamp(-limit, limit)
        result = _sum((d, m), (b, x0), (a, x), (s, z))
    return result, x0


def _sum(*terms: tuple[float, Tensor | None]) -> Tensor:
    total: Tensor | None = None
    for coefficient, operand in terms:
        if coefficient != 0 and operand is not None:
            total = operand * coefficient if total is None else total + operand * coefficient
    if total is None:
        first = next(operand for _, operand in terms if operand is not None)
        return torch.zeros_like(first)
    return total


def _doubled(shape: torch.Size) -> torch.Size | None:
    return torch.Size((shape[0], 2 * shape[1], *shape[2:])) if len(shape) > 1 else None


def _check_memory(inputs: dict[str, Tensor | None], outputs: dict[str, Tensor | None]) -> None:
    # The kernel writes block by block: `out` may coincide with an input, element for element; nothing else may overlap.
    others = {name: tensor for name, tensor in inputs.items() if isinstance(tensor, Tensor)}
    for name, tensor in outputs.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires gradients: it cannot be written in place")
        for other_name, other in others.items():
            coincides = name == "out" and (tensor is other or _layout(tensor) == _layout(other))
            if not coincides and _overlap(tensor, other):
                raise ValueError(f"{name} overlaps {other_name} in memory")
        others[name] = tensor


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _overlap(a: Tensor, b: Tensor) -> bool:
    first, other_first = a.data_ptr(), b.data_ptr()
    if first == 0 or other_first == 0 or a.device != b.device:  # nothing there, or another machine's addresses
        return False
    return first < other_first + _reach(b) and other_first < first + _reach(a)


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last one."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _check_state(x: Tensor) -> None:
    checked_shape("x", x.shape)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 (or float64 with the reference backend), got {x.dtype}")


def _check_output(m: Tensor, x: Tensor) -> None:
    if m.shape != x.shape and m.shape != _doubled(x.shape):
        raise ValueError(f"model_output must have x's shape {tuple(x.shape)} or twice its axis 1, got {tuple(m.shape)}")
    if m.device != x.device:
        raise ValueError(f"model_output lies on {m.device}, x on {x.device}")
    if not m.is_floating_point():
        raise TypeError(f"model_output must be floating point, got {m.dtype}")


def _checked_noise(noise: Tensor | None, x: Tensor) -> Tensor:
    _check_like("noise", noise, x, dtype=x.dtype)
    assert noise is not None
    return noise


def _check_like(name: str, tensor: Tensor | None, x: Tensor, *, dtype: torch.dtype | None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != x.shape:
        raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} lies on {tensor.device}, x on {x.device}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} as x is, got {tensor.dtype}")
