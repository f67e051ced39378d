"""kernels/noise.py, posterior.py and what they share: the CPU kernels' bits; interpreted where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastsample import Table
from fastsample.ops import randn
from fastsample.ops.backend import cpu_module
from fastsample.ops.noise.keys import sample_keys
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan
from support.devices import DEVICE
from support.levels import needs_cpu
from support.paths import ROOT
from support.philox import KNOWN_ANSWERS

pytest.importorskip("triton")
from fastsample.kernels import arithmetic, blocks, noise, posterior
from fastsample.kernels.arithmetic import exp2_of, fma, rounded, tl, triton
from support.triton_launch import Framed, small_launches

_cpu = cpu_module()


@triton.jit
def words_kernel(counters, keys, out, N: tl.constexpr):
    i = tl.arange(0, N)
    c0, c1 = tl.load(counters + i).to(tl.uint32), tl.load(counters + N + i).to(tl.uint32)
    c2, c3 = tl.load(counters + 2 * N + i).to(tl.uint32), tl.load(counters + 3 * N + i).to(tl.uint32)
    key0, key1 = tl.load(keys + i).to(tl.uint32), tl.load(keys + N + i).to(tl.uint32)
    w0, w1, w2, w3 = noise.philox(c0, c1, c2, c3, key0, key1)
    tl.store(out + i, w0.to(tl.int64))
    tl.store(out + N + i, w1.to(tl.int64))
    tl.store(out + 2 * N + i, w2.to(tl.int64))
    tl.store(out + 3 * N + i, w3.to(tl.int64))


@triton.jit(do_not_specialize=["first", "seed", "step", "stream"])
def normals_kernel(out, first: tl.int64, key: tl.int64, step: tl.int64, stream: tl.int64, QUADS: tl.constexpr):
    z = noise.normals(first, tl.cast(key, tl.int64), step, stream, QUADS)
    tl.store(out + blocks.tile_offsets(QUADS), z)


@triton.jit
def fma_kernel(x, y, z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


@triton.jit
def exp2_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, exp2_of(tl.load(x + i)))


@triton.jit
def rounded_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, rounded(tl.load(x + i), out.dtype.element_ty))


def words(counters: np.ndarray, keys: np.ndarray) -> np.ndarray:
    count = counters.shape[1]
    out = torch.zeros((4, count), dtype=torch.int64, device=DEVICE)
    on = [torch.from_numpy(one.astype(np.int64)).to(DEVICE) for one in (counters, keys)]
    words_kernel[(1,)](*on, out, N=count)
    return out.cpu().numpy()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    assert tuple(words(np.array(counter)[:, None], np.array(key)[:, None])[:, 0]) == expected


@needs_cpu
def test_philox_words_are_those_of_the_cpu_kernel() -> None:
    drawn = np.random.default_rng(0).integers(0, 2**32, (6, 64))
    found = words(drawn[:4], drawn[4:])
    for i in range(64):
        assert tuple(found[:, i]) == tuple(_cpu.philox(drawn[:4, i].tolist(), drawn[4:, i].tolist()))


@needs_cpu
@pytest.mark.parametrize("level", ["scalar"], indirect=True)
@pytest.mark.parametrize(
    ("shape", "seed", "step", "stream"),
    [
        pytest.param((1, 1), 0, 0, 0, id="1 element"),
        pytest.param((2, 3), 5, 1, 0, id="less than a quad"),
        pytest.param((1, 16, 7), -1, 2, 1, id="actions, seed 2^64 - 1"),
        pytest.param((3, 5, 7, 3), 2**63 - 1, 999, 1, id="105 elements, seed 2^63 - 1"),
        pytest.param((2, 4100), 2**40 + 7, 2**31, 2, id="4100 elements, step 2^31"),
        pytest.param((1, 4099), 3, 2**32 - 1, 2**32 - 1, id="4099 elements, last step and stream"),
    ],
)
def test_normals_have_the_cpu_kernels_bits(level: str, shape: tuple, seed: int, step: int, stream: int) -> None:
    framed = Framed(shape)
    noise.randn(framed.output, sample_keys(seed, 0, shape[0], DEVICE), step, stream)
    expected = randn(shape, seed=seed, step=step, stream=stream, backend="cpu")
    assert torch.equal(framed.written().view(torch.int32), expected.view(torch.int32))


@needs_cpu
@pytest.mark.parametrize("size", [1, 255, 300], ids=str)
def test_a_sample_may_take_several_tiles_and_programs(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    small_launches(monkeypatch, noise)
    framed = Framed((3, size))
    noise.randn(framed.output, sample_keys(7, 0, 3, DEVICE), 3, 1)
    assert torch.equal(framed.written(), randn((3, size), seed=7, step=3, stream=1, backend="cpu"))


@needs_cpu
@pytest.mark.parametrize("first", [2**34 - 128, 2**34, 2**40 + 128, 2**63 - 128], ids=str)
def test_counters_beyond_32_bits(first: int) -> None:
    out = torch.full((128,), float("nan"), device=DEVICE)
    normals_kernel[(1,)](out, first, -3, 2**32 - 2, 1, QUADS=32)
    expected = torch.empty(128)
    _cpu.normals(expected.data_ptr(), first, 128, 2**64 - 3, 2**32 - 2, 1)
    assert torch.equal(out.cpu(), expected)


def test_launches_cover_every_element_once() -> None:
    for batch, size in ((1, 1), (3, 127), (70_000, 5), (2**17 + 1, 4), (1, 2**33 + 1), (16, 3 * 512 * 512)):
        found = blocks.blocks_of(batch, size)
        assert max(found.grid[1:]) <= 65535 and found.grid[0] < 2**31
        assert found.grid[1] * found.grid[2] >= batch
        assert (
            (found.grid[0] - 1) * found.parts * found.quads * 4 < size <= found.grid[0] * found.parts * found.quads * 4
        )


def test_fma_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn((2, 1024), generator=generator)
    z = -x * y  # what is left is the product's own rounding error
    out = torch.empty(1024, device=DEVICE)
    fma_kernel[(1,)](x.to(DEVICE), y.to(DEVICE), z.to(DEVICE), out, N=1024)
    assert torch.equal(out.cpu().double(), x.double() * y.double() + z.double())
    assert out.any()


def test_exp2_is_within_1_and_a_half_ulp_and_stays_inside_its_range() -> None:
    x = torch.cat([torch.linspace(-126, 127, 4092), torch.tensor([-1e9, -torch.inf, torch.inf, torch.nan])])
    out = torch.empty(4096, device=DEVICE)
    exp2_kernel[(1,)](x.to(DEVICE), out, N=4096)
    exact = torch.exp2(x.double().clamp(-126, 127)).numpy()
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(out.cpu().numpy() - exact) / ulp)[:-1].max() < 1.5
    assert out[-1].isnan()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter's, on the way to infinity
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_halves_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2032, generator=generator) * torch.logspace(-6, 4, 2032)
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 0.0, -0.0, 65519.9, 65520.0])
    x = torch.cat([drawn, ties, -ties])
    x[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    out = torch.empty(2048, dtype=dtype, device=DEVICE)
    rounded_kernel[(1,)](x.to(DEVICE), out, N=2048)
    assert torch.equal(out.cpu().view(torch.int16)[3:], x.to(dtype).view(torch.int16)[3:])
    assert out[2].isnan() and out[0] == torch.inf and out[1] == -torch.inf


TABLE = Table(
    [2, 1, 0],
    p=[2.0, 1.5, 1.2],
    q=[-1.0, 0.0, -0.5],
    a=[0.3, 0.2, 0.0],
    b=[0.6, 0.9, 1.0],
    d=[0.0, 0.1, 0.2],
    s=[0.3, 0.2, 0.1],
    g1=[0.5, 0.4, 0.3],
    limit=[1.0, torch.inf, 2.0],
)


@needs_cpu
@pytest.mark.parametrize("level", ["scalar"], indirect=True)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)
@pytest.mark.parametrize(
    ("shape", "row"),
    [
        pytest.param((2, 1), 0, id="1 element"),
        pytest.param((3, 5, 7, 3), 1, id="105 elements"),
        pytest.param((4, 16, 7), (2, -3, 1, 0), id="rows of samples"),
    ],
)
def test_posterior_is_the_step_without_noise(level: str, shape: tuple, row: int | tuple, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator)
    m = torch.randn((shape[0], 2 * shape[1], *shape[2:]), generator=generator).to(dtype)
    constant, slope = torch.randn((2, shape[0]), generator=generator)
    row_of = torch.tensor(row) if isinstance(row, tuple) else None
    mean, log_variance = Framed(shape), Framed(shape)
    posterior.posterior(
        torch.from_numpy(TABLE.packed.copy()).to(DEVICE),
        None if row_of is None else row_of.to(DEVICE),
        row if isinstance(row, int) else 0,
        x.to(DEVICE),
        m.to(DEVICE),
        2 * x[0].numel(),
        constant.to(DEVICE),
        slope.to(DEVICE),
        mean.output,
        log_variance.output,
    )
    noise_free = TABLE.replace(s=0.0, g1=0.0)
    rows = None if row_of is None else row_of % 3
    assert torch.equal(
        mean.written(), StepPlan(Operands(x, noise_free, rows=rows), "cpu")(m, 0 if rows is not None else row)
    )
    v = m[:, shape[1] :].double()
    per_sample = [one.double().reshape(-1, *(1,) * (x.ndim - 1)) for one in (constant, slope)]
    # Rounded once: the product of two floats is exact in float64.
    assert torch.equal(log_variance.written(), (per_sample[0] + per_sample[1] * v).float())


def test_posterior_of_a_row_outside_the_table_is_nan() -> None:
    x = torch.ones(4, 5, device=DEVICE)
    mean = torch.zeros(4, 5, device=DEVICE)
    rows = torch.from_numpy(TABLE.packed.copy()).to(DEVICE)
    row_of = torch.tensor([3, 0, -4, 2**40], device=DEVICE)
    posterior.posterior(rows, row_of, 0, x, x, 5, torch.zeros(4, device=DEVICE), None, mean, None)
    assert mean.isnan().all(dim=1).tolist() == [True, False, True, True]
    assert mean[1].isfinite().all()


def test_triton_is_imported_with_its_kernels_alone() -> None:
    program = """
import sys
import fastsample, fastsample.kernels
print("triton" in sys.modules)
sys.modules["triton"] = None
try:
    import fastsample.kernels.noise
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported, reason = done.stdout.splitlines()
    assert imported == "False" and "pip install 'fastsample[triton]'" in reason


def test_a_triton_that_is_too_old_is_named_and_not_chosen() -> None:
    program = """
import torch, triton
triton.__version__ = "3.3.1+git"
import fastsample
from fastsample.ops import backend
print(fastsample.backends()["triton"]["reason"])
print(backend.choose(None, torch.device("cuda"), native=True, offers=("triton",)))
try:
    backend.choose("triton", torch.device("cpu"), native=True)
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    reason, automatic, explicit = done.stdout.splitlines()
    assert "need triton 3.4 or newer, not 3.3.1+git" in reason and reason in explicit
    assert automatic == "reference"


def test_the_minimum_of_triton_is_the_declared_one() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"triton>={".".join(map(str, arithmetic.MINIMUM))};' in project
