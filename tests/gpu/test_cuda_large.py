"""The CUDA step over more than 2^31 elements, by index arithmetic: address space without memory, few of the blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import Table, ops
from fastsample.ops.backend import cpu_module
from support.cuda_on_cpu import calls
from support.cuda_on_cpu.build import CudaOnCpu
from support.formula import normal
from support.splitmix import key, signed

_cpu = cpu_module()

pytest_plugins = ["support.cuda_on_cpu.fixtures"]
pytestmark = pytest.mark.usefixtures("scalar")

TABLE = Table(
    [4, 3, 2, 1, 0], p=1.25, q=-0.75, a=0.2, b=0.9, d=0.3, c1=[0, 0, 0, 0.4, 0], c2=[0, 0, 0, -0.3, 0],
    c3=[0, 0, 0, 0.2, 0], s=0.5, g0=-0.4, g1=0.7, limit=0.8, hx=0.4, h0=-0.6, e=[1.0, 1.0, 1.0, 1.0, 0.5],
)  # fmt: skip
ROW = 3
BOUNDARY = 2**31


class Large:
    """Operands of a guided step with a learned variance, of which only elements [first, last) of each sample exist."""

    def __init__(self, batch: int, size: int, dtype: torch.dtype) -> None:
        self.batch, self.size, self.dtype = batch, size, dtype
        shape = (batch, 1, size)
        self.x, self.out, self.entry, *self.history = (calls.sparse(shape) for _ in range(3 + TABLE.history))
        self.m = calls.sparse((2 * batch, 2, size), dtype)
        self.model_input = calls.sparse((2 * batch, 1, size), torch.float16)

    def run(self, on_cpu: CudaOnCpu, keys: Tensor, guidance: Tensor) -> None:
        """One launch; keys and guidance lie where the sample asked for finds its own."""
        h1, h2, h3 = (one.data_ptr() for one in self.history)
        kernel = on_cpu.module.Step(
            rows=TABLE.packed_address,
            row_count=len(TABLE),
            row_of=0,
            batch=self.batch,
            size=self.size,
            x=self.x.data_ptr(),
            keys=keys.data_ptr(),
            guidance=guidance.data_ptr(),
            rescale=0.0,
            thresholds=False,
            h1=h1,
            h2=h2,
            h3=h3,
            x0_out=self.entry.data_ptr(),
            input_out=self.model_input.data_ptr(),
            second_input_out=self.model_input[self.batch :].data_ptr(),
            input_dtype=1,
            low=0,
            high=0,
            log_prob_sums=0,
            workspace=0,
            device=0,
        )
        code = calls.CODES[self.dtype]
        kernel(ROW, self.m.data_ptr(), 2 * self.size, code, True, 0, self.out.data_ptr(), True, True, 0)

    def grid(self, on_cpu: CudaOnCpu, keys: Tensor, guidance: Tensor) -> tuple[int, int, int]:
        """Blocks across a sample, and the threads of one, across and down."""
        on_cpu.launches()
        with on_cpu.window(2**63, 2**63):
            self.run(on_cpu, keys, guidance)
        (launch,) = on_cpu.launches()
        return launch.grid[0], launch.block[0], launch.block[1]

    def fill(self, samples: slice, elements: slice) -> dict[str, Any]:
        """Puts normals where they will be read, NaN where they will be written; a call of ops.step on the same."""
        for i, operand in enumerate((self.x, *self.history)):
            here = operand[samples, :, elements]
            here.copy_(normal(here.shape, i))
        conditional = slice(self.batch + (samples.start or 0), self.batch + (samples.stop or self.batch))
        for i, half in enumerate((samples, conditional)):
            here = self.m[half, :, elements]
            here.copy_(normal(here.shape, 7 + i, self.dtype))
            self.model_input[half, :, elements] = float("nan")
        for target in (self.out, self.entry):
            target[samples, :, elements] = float("nan")
        return dict(
            x=self.x[samples, :, elements],
            model_output=torch.cat([self.m[samples, :, elements], self.m[conditional, :, elements]]),
            history=[one[samples, :, elements] for one in self.history],
        )

    def check(self, samples: slice, elements: slice, call: dict[str, Any], guidance: list[float], z: Tensor) -> None:
        entry, model_input = torch.empty_like(call["x"]), torch.empty((2 * len(z), *z.shape[1:]), dtype=torch.float16)
        want = ops.step(
            table=TABLE, row=ROW, guidance=guidance, noise=z, x0_out=entry, input_out=model_input, backend="cpu", **call
        )
        assert calls.same_bits(self.out[samples, :, elements].contiguous(), want)
        assert calls.same_bits(self.entry[samples, :, elements].contiguous(), entry)
        conditional = slice(self.batch + (samples.start or 0), self.batch + (samples.stop or self.batch))
        halves = torch.cat([self.model_input[samples, :, elements], self.model_input[conditional, :, elements]])
        assert calls.same_bits(halves, model_input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("size", "near"),
    [
        (BOUNDARY + 8192, BOUNDARY),
        (BOUNDARY + 8192, BOUNDARY // 2),
        (BOUNDARY + 8189, BOUNDARY),
        (BOUNDARY + 8189, None),
    ],
    ids=["whole-2^31", "whole-2^30", "odd-2^31", "odd-end"],
)
def test_one_sample(on_cpu: CudaOnCpu, size: int, near: int | None, dtype: torch.dtype) -> None:
    keys, guidance = torch.tensor([2**40 + 1]), torch.tensor([7.5])
    large = Large(1, size, dtype)
    across, wide, _ = large.grid(on_cpu, keys, guidance)
    (per_thread,) = (n for n in (1, 2, 4, 8, 16) if -(-size // (wide * n)) == across)
    per_block = wide * per_thread
    block = across - 1 if near is None else near // per_block
    elements = slice((block - 1) * per_block, min((block + 1) * per_block, size))
    call = large.fill(slice(0, 1), elements)
    with on_cpu.window(block - 1, block):
        large.run(on_cpu, keys, guidance)
    z = torch.empty(1, 1, elements.stop - elements.start)
    _cpu.normals(z.data_ptr(), elements.start, z.numel(), 2**40 + 1, ROW, 1)
    large.check(slice(0, 1), elements, call, [7.5], z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("size", [7, 8, 1032, 1029])
def test_many_samples(on_cpu: CudaOnCpu, size: int, dtype: torch.dtype) -> None:
    batch = BOUNDARY // size + 9
    keys, guidance = calls.sparse((batch,), torch.int64), calls.sparse((batch,))
    large = Large(batch, size, dtype)
    across, _, high = large.grid(on_cpu, keys, guidance)
    first = (batch - 20) // high * high
    samples = slice(first, batch)
    keys[samples] = signed(key(100, place) for place in range(batch - first))
    guidance[samples] = torch.linspace(0, 9, batch - first)
    call = large.fill(samples, slice(0, size))
    with on_cpu.window(first // high * across, -(-batch // high) * across - 1):
        large.run(on_cpu, keys, guidance)
    z = ops.randn((batch - first, 1, size), seed=100, step=ROW, stream=1, backend="cpu")
    large.check(samples, slice(0, size), call, guidance[samples].tolist(), z)
