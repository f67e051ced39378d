"""What `fastsample selftest` checks: every op in every mode, what it must give, and how many roundings lie between.

An error is counted in unit roundoffs u (2^-24 in float32) of the sum of the sizes of the terms that were added up. Then
the number allowed is the number of roundings on the longest way from an operand to the result, whatever cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsample.ops import LowRank, lora_linear, pack_adapters, pack_linear, posterior, randn, step
from fastsample.ops.likelihood import likelihood
from fastsample.ops.lora import lora_linear_reference
from fastsample.ops.noise import STEP
from fastsample.ops.step.reductions import rescale_factor
from fastsample.ops.step.reference import step_reference
from fastsample.samplers import DDIM, DDPM, DPMSolver, DynamicThreshold, Euler
from fastsample.schedule import Schedule
from fastsample.tables import Table

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Shape = tuple[int, ...]
TINY: Shape = (1, 3)
ODD: Shape = (3, 5, 7)
TAIL: Shape = (2, 4, 33, 31)
LATENTS: Shape = (8, 4, 64, 64)
SEED = 7
Call = Callable[[], Sequence[Tensor]]
ELEMENT_WISE = frozenset({"reference", "cpu", "triton", "cuda"})
_SINGLE = 2.0**-24
_SMALL = 512  # elements: what Triton's interpreter runs in less than seconds


class Wanted(NamedTuple):
    """One result: its value in float64, the size of its terms, and how many roundings may lie between."""

    value: Tensor
    size: Tensor
    roundings: float
    dtype: torch.dtype = torch.float32

    @property
    def unit(self) -> float:
        """The unit roundoff of what the result is stored in."""
        return torch.finfo(self.dtype).eps / 2

    @property
    def allowed(self) -> float:
        """In units: the roundings of float32, and the last one where the result is stored in half precision."""
        return self.roundings if self.dtype == torch.float32 else 1 + self.roundings * _SINGLE / self.unit

    def error(self, found: Tensor) -> float:
        """The largest error in units; infinite where a value is missing or the dtype or shape is another."""
        if found.shape != self.value.shape or found.dtype != self.dtype:
            return float("inf")
        gap = (found.double().cpu() - self.value).abs()
        error = torch.where(gap == 0, 0.0, gap / self.size.clamp_min(torch.finfo(self.dtype).tiny) / self.unit)
        return float(error.nan_to_num(nan=float("inf")).max())


@dataclass(frozen=True)
class Case:
    """One check.

    Attributes:
        op, mode, dtype, shape: what is called; the dtype is that of the model's output, or of LoRA's weights.
        prepare: prepare(backend, device) returns the call.
        wanted: what its results must be.
        same_bits: whether the design promises the same bits from all compiled backends.
        backends: those that have this op.
        on_gpu: whether it runs on GPUs alone.
    """

    op: str
    mode: str
    dtype: torch.dtype
    shape: Shape
    prepare: Callable[[str, torch.device], Call]
    wanted: Sequence[Wanted]
    same_bits: bool = True
    backends: frozenset[str] = ELEMENT_WISE
    on_gpu: bool = False

    @property
    def small(self) -> bool:
        """Whether an interpreter can be waited for."""
        return math.prod(self.shape) <= _SMALL


def cases(quick: bool = False) -> Iterator[Case]:
    """All checks, or those of small shapes."""
    shapes = (TINY, ODD, *(() if quick else (TAIL, LATENTS)))
    yield from (_noise(shape) for shape in shapes)
    yield _noise(ODD, "last step, a seed below 0", seed=-2, index=2**63, row=2**32 - 1)
    yield _noise(ODD, "strided out", strided=True)
    for mode in MODES:
        for dtype in DTYPES:
            for shape in shapes if dtype == torch.float32 else shapes[1:3]:
                yield mode.case(dtype, shape)
    for dtype in DTYPES:
        yield from (_posterior(dtype, shape) for shape in shapes[1:3])
    for dtype in DTYPES:
        yield from (_likelihood(dtype, shape, row) for shape in shapes[1:3] for row in (5, 9))
    for dtype in DTYPES:
        yield from (_lora(dtype, *sizes) for sizes in ((3, 5, 24), *(() if quick else ((2, 77, 80),))))


def _noise(
    shape: Shape, mode: str = "normals", *, seed: int = SEED, index: int = 0, row: int = 3, strided: bool = False
) -> Case:
    def prepare(backend: str, device: torch.device) -> Call:
        out = torch.empty((*shape[:-1], 2 * shape[-1] + 1), device=device)[..., 1::2] if strided else None
        place = {"device": device} if out is None else {"out": out}
        return lambda: [randn(shape, seed=seed, index=index, step=row, stream=STEP, backend=backend, **place)]

    value = _normals(shape, seed, index, row).double()
    # One unit in the last place, which is two unit roundoffs at most.
    return Case("randn", mode, torch.float32, shape, prepare, [Wanted(value, value.abs(), 2)])


@dataclass(frozen=True)
class Mode:
    """A way to call `step`.

    Attributes:
        name: as the table shows it.
        table, row: which row; one per sample, round and round, where it is a tuple.
        roundings: of x': 1 for a coefficient's own and 1 for each product added, and what comes before:
            guidance 3 (w - 1, m - u, the sum), x0 3, its threshold's quantile 3 and its division 1, noise 2, learned
            variance 6 (the exponent 2, 2^x 3, the product 1), the rescaling factor 2 and what m's own errors do to the
            deviations that it is made of.
        rows_there: rows lie on the GPU, where kernels alone read them.
    """

    name: str
    table: Table
    row: int | tuple[int, ...]
    roundings: float
    guided: bool = False
    rescale: float = 0.0
    keeps_x0: bool = False
    writes_input: bool = False
    same_bits: bool = True
    rows_there: bool = False

    def case(self, dtype: torch.dtype, shape: Shape) -> Case:
        """The mode with these operands."""
        batch = shape[0]
        row = self.row if isinstance(self.row, int) else torch.tensor((self.row * batch)[:batch])
        first = row if isinstance(row, int) else int(row[0])
        table, learned = self.table, self.table.learned[first]
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=draw)
        m = torch.randn((batch * (1 + self.guided), shape[1] * (1 + learned), *shape[2:]), generator=draw).to(dtype)
        history = [torch.randn(shape, generator=draw) for _ in range(table.history)]
        guidance = torch.linspace(1.5, 7.5, batch) if self.guided else None
        wanted = self._wanted(x, m, row, history, guidance)

        def prepare(backend: str, device: torch.device) -> Call:
            inputs = [one.to(device) for one in (x, m, *history)]
            x0 = torch.empty_like(inputs[0]) if self.keeps_x0 else None
            following = inputs[1].new_empty((2 * batch, *shape[1:])) if self.writes_input else None
            given: dict[str, Any] = {
                "seed": SEED if table.stochastic[first] else None,
                "guidance": None if guidance is None else guidance.to(device),
                "guidance_rescale": self.rescale,
                "history": inputs[2:],
                "out": torch.empty_like(inputs[0]),
                "x0_out": x0,
                "input_out": following,
                "backend": backend,
            }
            at = row.to(device) if isinstance(row, Tensor) and self.rows_there else row
            return lambda: [
                step(inputs[0], inputs[1], table, at, **given),
                *(one for one in (x0, following) if one is not None),
            ]

        return Case("step", self.name, dtype, shape, prepare, wanted, self.same_bits, on_gpu=self.rows_there)

    def _wanted(
        self, x: Tensor, m: Tensor, row: int | Tensor, history: Sequence[Tensor], guidance: Tensor | None
    ) -> list[Wanted]:
        table, z = self.table, self._noise_of(x, row)
        wide = (x.double(), m.double(), table, row, z.double(), None)
        w = None if guidance is None else guidance.double()
        value, x0 = step_reference(*wide, w, self.rescale, [one.double() for one in history])
        columns = ("p", "q", "a", "b", "c1", "c2", "d", "s")
        sizes = table.replace(**{name: abs(getattr(table, name)) for name in columns}, limit=float("inf"), quantile=0.0)
        size, size_x0 = step_reference(
            x.double().abs(), self._size_of_m(x, m, w), sizes, row, z.double().abs(), None, None, 0.0,
            [one.double().abs() for one in history],
        )  # fmt: skip
        if table.thresholded:
            # The bound is a value of the whole sample, and so is what it brings in of roundings.
            largest = size_x0.flatten(1).amax(1).reshape(-1, *(1,) * (x.ndim - 1))
            first = row if isinstance(row, int) else int(row[0])
            size, size_x0 = size + abs(float(table.b[first])) * largest, size_x0 + largest
        found = [Wanted(value, size, self.roundings)]
        if self.keeps_x0:
            found.append(Wanted(x0, size_x0, 3))
        if self.writes_input:
            assert isinstance(row, int)
            scale = float(table.e[row + 1])
            twice = [torch.cat([scale * one] * 2) for one in (value, size)]
            found.append(Wanted(twice[0], twice[1], self.roundings + 2, m.dtype))
        return found

    def _size_of_m(self, x: Tensor, m: Tensor, w: Tensor | None) -> Tensor:
        """|m_c| + |w - 1| (|m_c| + |m_u|), rescaled as m is; the variance half stays as it is."""
        channels = x.shape[1]
        conditional = m[-len(x) :].double()
        size, v = conditional[:, :channels].abs(), conditional[:, channels:]
        if w is not None:
            weight = w.reshape(-1, *(1,) * (x.ndim - 1))
            unconditional = m[: len(x), :channels].double()
            size = size + (weight - 1).abs() * (size + unconditional.abs())
            if self.rescale:
                m_c = conditional[:, :channels]
                size = size * rescale_factor(m_c + (weight - 1) * (m_c - unconditional), m_c, self.rescale)
        return torch.cat([size, v], dim=1)

    def _noise_of(self, x: Tensor, row: int | Tensor) -> Tensor:
        rows = [row] * len(x) if isinstance(row, int) else row.tolist()
        own = [_normals((1, *x.shape[1:]), SEED, i, int(k)) for i, k in enumerate(rows)]
        return torch.cat(own)


def _normals(shape: Shape, seed: int, index: int, row: int) -> Tensor:
    return randn(shape, seed=seed, index=index, step=row, stream=STEP, backend="reference")


_LINEAR = Schedule.linear()
_FREE = DDIM(_LINEAR, steps=10).table
_NOISY = DDIM(_LINEAR, steps=10, eta=1.0).table
_CLIPPED = DDIM(_LINEAR, steps=10, clip=1.0).table
_LEARNED = DDPM(_LINEAR, steps=10, variance="learned_range", clip=1.0).table
# A quantile and sizes that are dyadic: the rank is exact, so that only values are rounded.
_DYNAMIC = DDIM(_LINEAR, steps=10, clip=DynamicThreshold(quantile=0.9375)).table
MODES = (
    Mode("folded", _FREE, 5, 3),
    Mode("clipped", _CLIPPED, 5, 3 + 3),
    Mode("dynamic threshold", _DYNAMIC, 5, 3 + 3 + 4),
    Mode("history, x0 kept", DPMSolver(_LINEAR, steps=10).table, 5, 4, keeps_x0=True),
    Mode("noise", _NOISY, 5, 2 + 4),
    Mode("learned variance", _LEARNED, 5, 3 + 2 + 6 + 4),
    Mode("guidance", _FREE, 5, 3 + 3, guided=True),
    Mode("guidance rescale", _FREE, 5, 3 + 3 + 2 + 8, guided=True, rescale=0.7, same_bits=False),
    Mode("rows per sample", _NOISY, (5, 1, 8), 2 + 4),
    Mode("rows per sample, there", _NOISY, (5, 1, 8), 2 + 4, rows_there=True),
    Mode("next input, twice", Euler(_LINEAR, steps=10, timesteps="karras").table, 5, 3, writes_input=True),
)


def _posterior(dtype: torch.dtype, shape: Shape) -> Case:
    row, draw = 5, torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw)
    m = torch.randn((shape[0], 2 * shape[1], *shape[2:]), generator=draw).to(dtype)

    def prepare(backend: str, device: torch.device) -> Call:
        there = x.to(device), m.to(device)
        return lambda: posterior(*there, _LEARNED, row, backend=backend)

    mean, log_variance = posterior(x.double(), m.double(), _LEARNED, row)
    quiet = _LEARNED.replace(s=0.0, g0=0.0, g1=0.0)
    mode = Mode("mean and log variance", quiet, row, 3 + 3)
    size = mode._wanted(x, m[:, : shape[1]], row, (), None)[0].size
    # Constant and slope are rounded once, the product and the sum once each.
    slope_v = 2 * float(_LEARNED.g1[row]) * m[:, shape[1] :].double()
    size_of_log = (log_variance - slope_v).abs() + slope_v.abs()
    wanted = [Wanted(mean, size, mode.roundings), Wanted(log_variance, size_of_log, 3)]
    return Case("posterior", mode.name, dtype, shape, prepare, wanted)


def _likelihood(dtype: torch.dtype, shape: Shape, row: int) -> Case:
    draw, table = torch.Generator().manual_seed(0), _LEARNED
    assert table.alpha is not None and table.sigma is not None
    pixels = torch.randint(256, shape, generator=draw) / 127.5 - 1
    z, miss = (torch.randn(shape, generator=draw) for _ in range(2))
    x = float(table.alpha[row]) * pixels + float(table.sigma[row]) * z
    m = torch.cat([z + 0.2 * miss, torch.rand(shape, generator=draw) * 2 - 1], dim=1).to(dtype)

    def prepare(backend: str, device: torch.device) -> Call:
        data, state, output = (one.to(device) for one in (pixels, x, m))
        return lambda: [likelihood(data, state, output, table, row, backend=backend)]

    data, state, output = operands = [one.double().requires_grad_() for one in (pixels, x, m)]
    bits = likelihood(data, state, output, table, row)
    gradients = torch.autograd.grad(bits.sum(), operands)
    # What a rounding of every operand, and of the term itself, does to the result; each goes through at most 16.
    size = sum((g * one).abs().reshape(shape[0], -1).sum(1) for g, one in zip(gradients, operands, strict=True))
    wanted = Wanted(bits.detach(), (size + bits.abs()).detach(), 16)
    mode = "pixels' bins" if row == len(table) - 1 else "divergence"
    return Case("likelihood", mode, dtype, shape, prepare, [wanted], False, frozenset({"reference", "triton"}))


def _lora(dtype: torch.dtype, batch: int, rows: int, width: int) -> Case:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=draw) / shape[-1] ** 0.5).to(dtype)

    x = torch.randn(batch, rows, width, generator=draw).to(dtype)
    features, ranks = (width, width // 2 + 1, 2 * width), (4, 16)
    weights = [normal(n, width) for n in features]
    groups = [[LowRank(normal(r, width), normal(n, r), torch.tensor(0.5)) for n in features] for r in ranks]
    index = torch.tensor([0, 1, -1][:batch])

    def prepare(backend: str, device: torch.device) -> Call:
        packed = pack_linear([weight.to(device) for weight in weights])
        there = [[LowRank(*(factor.to(device) for factor in one)) for one in group] for group in groups]
        adapters, chosen, given = pack_adapters(packed, there), index.to(device), x.to(device)
        return lambda: lora_linear(given, packed, adapters, adapter_index=chosen, backend=backend)

    def in_float64(change: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
        wide = [change(weight.double()) for weight in weights]
        factors = [[LowRank(*(change(factor.double()) for factor in one)) for one in group] for group in groups]
        return lora_linear_reference(change(x.double()), wide, None, factors, index)

    # Every product and every sum of the dot products, in whatever order; t once more in half precision.
    roundings = width + max(ranks) + 4
    extra = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 / _SINGLE
    values, sizes = in_float64(lambda one: one), in_float64(torch.abs)
    wanted = [Wanted(y, size, roundings + extra, dtype) for y, size in zip(values, sizes, strict=True)]
    mode = "q, k, v, adapter per sample"
    return Case("lora_linear", mode, dtype, (batch, rows, width), prepare, wanted, False, ELEMENT_WISE - {"cuda"})
