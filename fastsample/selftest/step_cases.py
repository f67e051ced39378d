"""The modes of `step`: which table, which row, and what is asked of the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.ops import step
from fastsample.ops.backend import Backend
from fastsample.ops.step.reductions import rescale_factor
from fastsample.ops.step.reference import step_reference
from fastsample.samplers import DDIM, DDPM, IPNDM, DPMSolver, DynamicThreshold, Euler
from fastsample.schedule import Schedule
from fastsample.selftest.case import SEED, Call, Case, Shape, Wanted, normals
from fastsample.tables import HISTORY, Table


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
    keeps_entry: bool = False
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
        wanted = self.wanted(x, m, row, history, guidance)

        def prepare(backend: Backend, device: torch.device) -> Call:
            inputs = [tensor.to(device) for tensor in (x, m, *history)]
            entry = torch.empty_like(inputs[0]) if self.keeps_entry else None
            following = inputs[1].new_empty((2 * batch, *shape[1:])) if self.writes_input else None
            options: dict[str, Any] = {
                "seed": SEED if table.stochastic[first] else None,
                "guidance": None if guidance is None else guidance.to(device),
                "guidance_rescale": self.rescale,
                "history": inputs[2:],
                "out": torch.empty_like(inputs[0]),
                "x0_out": entry,
                "input_out": following,
                "backend": backend,
            }
            at = row.to(device) if isinstance(row, Tensor) and self.rows_there else row
            return lambda: [
                step(inputs[0], inputs[1], table, at, **options),
                *(written for written in (entry, following) if written is not None),
            ]

        return Case("step", self.name, dtype, shape, prepare, wanted, self.same_bits, on_gpu=self.rows_there)

    def wanted(
        self, x: Tensor, m: Tensor, row: int | Tensor, history: Sequence[Tensor], guidance: Tensor | None
    ) -> list[Wanted]:
        """What the step must give for these operands: x', and what else the mode writes."""
        table, z = self.table, self._noise_of(x, row)
        wide = (x.double(), m.double(), table, row, z.double(), None)
        w = None if guidance is None else guidance.double()
        value, entry, _ = step_reference(*wide, w, self.rescale, [h.double() for h in history])
        columns = ("p", "q", "a", "b", *HISTORY, "d", "s", "hx", "h0")
        sizes = table.replace(**{name: abs(getattr(table, name)) for name in columns}, limit=float("inf"), quantile=0.0)
        size, size_of_entry, _ = step_reference(
            x.double().abs(), self._size_of_m(x, m, w), sizes, row, z.double().abs(), None, None, 0.0,
            [h.double().abs() for h in history],
        )  # fmt: skip
        if table.thresholded:
            # The bound is a value of the whole sample, and so is what it brings in of roundings.
            largest = per_sample(size_of_entry.flatten(1).amax(1), x)
            first = row if isinstance(row, int) else int(row[0])
            size, size_of_entry = size + abs(float(table.b[first])) * largest, size_of_entry + largest
        results = [Wanted(value, size, self.roundings)]
        if self.keeps_entry:
            # x0, and what is made of it: the coefficient's own, its product and the sum.
            results.append(Wanted(entry, size_of_entry, 3 if table.remembers_x0 else 3 + 3))
        if self.writes_input:
            assert isinstance(row, int)
            scale = float(table.e[row + 1])
            twice = [torch.cat([scale * half] * 2) for half in (value, size)]
            results.append(Wanted(twice[0], twice[1], self.roundings + 2, m.dtype))
        return results

    def _size_of_m(self, x: Tensor, m: Tensor, w: Tensor | None) -> Tensor:
        """|m_c| + |w - 1| (|m_c| + |m_u|), rescaled as m is; the variance half stays as it is."""
        channels = x.shape[1]
        conditional = m[-len(x) :].double()
        size, v = conditional[:, :channels].abs(), conditional[:, channels:]
        if w is not None:
            weight = per_sample(w, x)
            unconditional = m[: len(x), :channels].double()
            size = size + (weight - 1).abs() * (size + unconditional.abs())
            if self.rescale:
                m_c = conditional[:, :channels]
                size = size * rescale_factor(m_c + (weight - 1) * (m_c - unconditional), m_c, self.rescale)
        return torch.cat([size, v], dim=1)

    def _noise_of(self, x: Tensor, row: int | Tensor) -> Tensor:
        rows = [row] * len(x) if isinstance(row, int) else row.tolist()
        noise = [normals((1, *x.shape[1:]), SEED, i, int(k)) for i, k in enumerate(rows)]
        return torch.cat(noise)


_LINEAR = Schedule.linear()
_FREE = DDIM(_LINEAR, steps=10).table
_NOISY = DDIM(_LINEAR, steps=10, eta=1.0).table
_CLIPPED = DDIM(_LINEAR, steps=10, clip=1.0).table
_BOXED = DDIM(_LINEAR, steps=10, clip=(-0.6, 0.9)).table
LEARNED = DDPM(_LINEAR, steps=10, variance="learned_range", clip=1.0).table
# A quantile and sizes that are dyadic: the rank is exact, so that only values are rounded.
_DYNAMIC = DDIM(_LINEAR, steps=10, clip=DynamicThreshold(quantile=0.9375)).table
MODES = (
    Mode("folded", _FREE, 5, 3),
    Mode("clipped", _CLIPPED, 5, 3 + 3),
    Mode("clipped to low and high", _BOXED, 5, 3 + 3),
    Mode("dynamic threshold", _DYNAMIC, 5, 3 + 3 + 4),
    Mode("history, x0 kept", DPMSolver(_LINEAR, steps=10).table, 5, 4, keeps_entry=True),
    Mode("three epsilons", IPNDM(_LINEAR, steps=10).table, 5, 1 + 5, keeps_entry=True),
    Mode("three epsilons, clipped", IPNDM(_LINEAR, steps=10, clip=1.0).table, 5, 3 + 1 + 5, keeps_entry=True),
    Mode("noise", _NOISY, 5, 2 + 4),
    Mode("learned variance", LEARNED, 5, 3 + 2 + 6 + 4),
    Mode("guidance", _FREE, 5, 3 + 3, guided=True),
    Mode("guidance rescale", _FREE, 5, 3 + 3 + 2 + 8, guided=True, rescale=0.7, same_bits=False),
    Mode("rows per sample", _NOISY, (5, 1, 8), 2 + 4),
    Mode("rows per sample, there", _NOISY, (5, 1, 8), 2 + 4, rows_there=True),
    Mode("next input, twice", Euler(_LINEAR, steps=10, timesteps="karras").table, 5, 3, writes_input=True),
)
