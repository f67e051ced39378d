"""ops.step against a float64 statement of the formula, on every backend and CPU level."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import LEVELS, golden
from torch import Tensor

from fastsample import DDIM, Schedule, Table, ops
from fastsample.ops.backend import _cpu

SHAPES = [(1, 1), (3, 5), (1, 16, 7), (2, 3, 5, 7), (2, 4, 33, 31), (1, 2, 2048), (3, 1, 4099)]
ROWS = {
    "folded": dict(p=1.25, q=-0.75, b=0.9, d=0.3),
    "folded-noise": dict(p=1.25, q=-0.75, b=0.9, d=0.3, s=0.5),
    "clamped": dict(p=1.25, q=-0.75, a=0.2, b=0.9, limit=0.8),
    "clamped-keeps-epsilon": dict(p=1.25, q=-0.75, b=0.9, d=0.3, limit=0.8),
    "all-terms": dict(p=1.25, q=-0.75, a=0.2, b=0.9, d=0.3, s=0.5, limit=0.8),
    "x0-only": dict(q=1.0, b=1.0),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    x, m, z = (torch.randn(shape, generator=generator) for _ in range(3))
    return x, m.to(dtype), z


def expected(x: Tensor, m: Tensor, z: Tensor, row: dict[str, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x', x0 and the sum of the magnitudes of the terms of x', in float64."""
    c = {"p": 0.0, "q": 0.0, "a": 0.0, "b": 0.0, "d": 0.0, "s": 0.0, "limit": math.inf, **row}
    x64, m64, z64 = (tensor.double().numpy() for tensor in (x, m, z))
    x0 = np.clip(c["p"] * x64 + c["q"] * m64, -c["limit"], c["limit"])
    terms = [c["a"] * x64, c["b"] * x0, c["d"] * m64, c["s"] * z64]
    inner = abs(c["b"]) * (abs(c["p"] * x64) + abs(c["q"] * m64))
    return sum(terms), x0, sum(abs(term) for term in terms) + inner


# Each of at most 8 roundings (4 coefficients, 4 sums) loses half an ulp, 2^-24, of the terms' magnitudes.
BOUND = 8 * 2.0**-24


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_matches_float64(backend: str, shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    x, m, z = inputs(shape, dtype)
    table = Table([10, 0], **ROWS[name])
    x0 = torch.full_like(x, math.nan)
    got = ops.step(x, m, table, 1, noise=z, x0_out=x0, backend=backend)
    want, want_x0, size = expected(x, m, z, ROWS[name])
    assert (np.abs(got.numpy() - want) <= BOUND * size).all()
    np.testing.assert_allclose(x0.numpy(), want_x0, atol=BOUND * 8)
    assert torch.equal(ops.step(x, m, table, 1, noise=z, backend=backend), got), "x0_out must not change x'"


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_in_place_on_every_level_and_thread_count(name: str, shape: tuple[int, ...]) -> None:
    if _cpu is None:
        pytest.skip("the C++ extension is not built")
    x, m, _ = inputs(shape, torch.bfloat16)
    table = Table([10, 0], **ROWS[name])
    results = set()
    before, threads = _cpu.isa(), torch.get_num_threads()
    for level in LEVELS:
        for count in (1, 2, 3):
            _cpu.set_isa(level)
            torch.set_num_threads(count)
            state, half = x.clone(), torch.full_like(x, math.nan, dtype=torch.float16)
            assert ops.step(state, m, table, 0, seed=11, out=state, input_out=half, backend="cpu") is state
            fresh = ops.step(x, m, table, 0, seed=11, backend="cpu")
            results.add((state.numpy().tobytes(), half.numpy().tobytes()))
            results.add((fresh.numpy().tobytes(), half.numpy().tobytes()))
    _cpu.set_isa(before)
    torch.set_num_threads(threads)
    assert len(results) == 1


@pytest.mark.parametrize("size", [1, 3, 20, 4099, 40_000])
def test_noise_in_the_pass_is_randn_of_the_row_on_stream_1(backend: str, size: int) -> None:
    x, m, _ = inputs((3, size))
    table = Table([9, 5, 0], **ROWS["all-terms"])
    drawn = ops.step(x, m, table, 2, seed=40, backend=backend)
    given = ops.step(
        x, m, table, 2, noise=ops.randn(x.shape, seed=40, step=2, stream=1, backend=backend), backend=backend
    )
    assert torch.equal(drawn, given)
    alone = ops.step(x[1:2], m[1:2], table, -1, seed=41, backend=backend)
    assert torch.equal(drawn[1:2], alone), "a sample must not depend on its batch"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_input_out_is_the_rounded_state(backend: str, dtype: torch.dtype) -> None:
    x, m, _ = inputs((3, 1000))
    x[0, :6] = torch.tensor([1e5, -1e5, 1e-6, 6e-8, 65519.0, 65520.0])
    m[0, :6] = 0
    table = Table([0], q=1.0, a=1.0)
    target = torch.full(x.shape, math.nan, dtype=dtype)
    state = ops.step(x, m, table, 0, input_out=target, backend=backend)
    assert torch.equal(target, state.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_every_half_precision_value_converts_exactly(backend: str, dtype: torch.dtype) -> None:
    m = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, -1)
    table = Table([0], q=1.0, b=1.0)
    out = torch.full(m.shape, math.nan, dtype=dtype)
    state = ops.step(torch.zeros(m.shape), m, table, 0, input_out=out, backend=backend)
    assert torch.equal(state.nan_to_num(1.5), m.float().nan_to_num(1.5))
    assert torch.equal(state.isnan(), m.isnan()) and torch.equal(out.isnan(), m.isnan())
    assert torch.equal(out.nan_to_num(1.5), m.nan_to_num(1.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_rounding_to_half_precision_is_to_nearest_even(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1, 200_000), generator=generator).to(torch.int32)
    x = bits.view(torch.float32).nan_to_num(0.0, 0.0, 0.0)
    halves = torch.arange(0, 2**15 - 1, dtype=torch.int16).view(dtype).float()
    ties = ((halves[1:] + halves[:-1]) / 2).nan_to_num(0.0, 0.0, 0.0)  # exact midpoints, subnormal ones too
    x = torch.cat([x, ties[None]], dim=1)
    out = torch.full(x.shape, math.nan, dtype=dtype)
    ops.step(x, torch.zeros_like(x), Table([0], a=1.0), 0, input_out=out, backend=backend)
    assert torch.equal(out, x.to(dtype))


def test_double_channels_use_the_first_half(backend: str) -> None:
    x, m, _ = inputs((3, 5, 7))
    both = torch.cat([m, torch.full_like(m, math.nan)], dim=1)
    table = Table([0], **ROWS["clamped"])
    assert torch.equal(ops.step(x, both, table, 0, backend=backend), ops.step(x, m, table, 0, backend=backend))


def test_operands_with_coefficient_0_are_not_read(backend: str) -> None:
    nan = torch.full((2, 70), math.nan)
    ones = torch.ones(2, 70)
    assert torch.equal(ops.step(nan, ones, Table([0], q=2.0, b=1.0), 0, backend=backend), 2 * ones)
    assert torch.equal(ops.step(ones, nan, Table([0], a=3.0), 0, backend=backend), 3 * ones)
    assert torch.equal(ops.step(ones, ones, Table([0], a=3.0), 0, noise=nan, backend=backend), 3 * ones)
    assert torch.equal(ops.step(nan, nan, Table([0]), 0, backend=backend), 0 * ones)


def test_nan_from_the_model_survives_the_clamp(backend: str) -> None:
    x, m = torch.zeros(1, 37), torch.zeros(1, 37)
    m[0, 5] = math.nan
    got = ops.step(x, m, Table([0], q=1.0, b=1.0, limit=1.0), 0, backend=backend)
    assert got.isnan().nonzero().tolist() == [[0, 5]]


@pytest.mark.parametrize("strided", ["x", "model_output", "noise", "out", "x0_out", "input_out"])
def test_strided_tensors_work(backend: str, strided: str) -> None:
    x, m, z = inputs((2, 3, 6, 5))
    table = Table([0], **ROWS["all-terms"])
    tensors = dict(
        x=x, model_output=m, noise=z, out=x.clone(), x0_out=torch.zeros_like(x), input_out=torch.zeros_like(x)
    )
    packed = {name: tensor.clone() for name, tensor in tensors.items()}
    ops.step(table=table, row=0, backend=backend, **packed)
    other = {name: tensor.clone() for name, tensor in tensors.items()}
    other[strided] = other[strided].to(memory_format=torch.channels_last)
    assert not other[strided].is_contiguous()
    ops.step(table=table, row=0, backend=backend, **other)
    for name in ("out", "x0_out", "input_out"):
        assert torch.equal(other[name], packed[name]), name


def test_float64_state_on_the_reference() -> None:
    x, m, z = (tensor.double() for tensor in inputs((2, 50)))
    table = Table([0], **ROWS["all-terms"])
    got = ops.step(x, m, table, 0, noise=z)
    want, _, _ = expected(x, m, z, ROWS["all-terms"])
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-14, atol=1e-15)


def test_gradients_flow_through_the_reference() -> None:
    x, m, _ = inputs((2, 50))
    x.requires_grad_()
    m.requires_grad_()
    ops.step(x, m, Table([0], p=2.0, q=3.0, a=0.5, b=1.0), 0).sum().backward()
    assert torch.allclose(x.grad, torch.full_like(x, 2.5)) and torch.allclose(m.grad, torch.full_like(m, 3.0))
    if _cpu is not None:
        with pytest.raises(ValueError, match="without gradients"):
            ops.step(x, m, Table([0], a=1.0), 0, backend="cpu")


GOLDEN = [
    pytest.param("iddpm_linear1000_ddim50", "ddim50", id="linear1000"),
    pytest.param("iddpm_cosine4000_100", "100", id="cosine4000"),
    pytest.param("iddpm_linear300_10-15-20", "10,15,20", id="linear300"),
]


@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clip"])
@pytest.mark.parametrize(("name", "timesteps"), GOLDEN)
def test_golden_single_steps(backend: str, name: str, timesteps: str, clip: float | None) -> None:
    """pred_x0 of improved-diffusion at x_T for four rows, within 1e-5 of the largest value before clipping.

    Clipping hides the size of what was rounded (at t = 980 x0 is a difference of numbers near 100), not its error.
    """
    data = golden(name)
    table = DDIM(Schedule.from_betas(data["betas"]), timesteps=timesteps, clip=clip).table
    x = torch.from_numpy(data["x_T"])
    wanted = data["pred_x0" if clip is None else "pred_x0_clip"]
    for index, want, unclipped in zip(data["step_index"], wanted, data["pred_x0"], strict=True):
        t = int(data["timesteps"][index])
        m = 0.6 * torch.tanh(x) + 0.2 * math.sin(0.013 * t)
        x0 = torch.full_like(x, math.nan)
        row = len(table) - 1 - int(index)
        assert table.t[row] == t
        ops.step(x, m, table, row, x0_out=x0, backend=backend)
        error = np.abs(x0.numpy() - want).max()
        assert error <= 1e-5 * np.abs(unclipped).max() and error <= 1e-4 * np.abs(want).max()


def test_outputs_must_not_cross_inputs(backend: str) -> None:
    x, m, z = inputs((2, 3, 4))
    buffer = torch.zeros(3, 3, 4)
    table = Table([0], p=1.0, q=1.0, b=1.0, d=1.0, limit=1.0)
    crossing = [
        dict(x=x, model_output=m, x0_out=x),
        dict(x=x, model_output=m, x0_out=m),
        dict(x=x, model_output=m, out=z, x0_out=z),
        dict(x=x, model_output=m, out=z, input_out=z),
        dict(x=buffer[:2], model_output=m, out=buffer[1:]),
        dict(x=x, model_output=m, out=m.view(2, 4, 3).transpose(1, 2)),
    ]
    for tensors in crossing:
        with pytest.raises(ValueError, match="overlaps"):
            ops.step(table=table, row=0, backend=backend, **tensors)
    want = ops.step(x, m, table, 0, backend=backend)
    assert torch.equal(ops.step(x, m, table, 0, out=m, backend=backend), want), "exactly the model's output is fine"


def test_autograd_knows_of_what_is_written(backend: str) -> None:
    x, m, _ = inputs((2, 3))
    weight = torch.ones(3, 1, requires_grad=True)
    product = (x @ weight).sum()
    ops.step(x, m, Table([0], a=2.0), 0, out=x, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(ValueError, match="requires gradients"):
        ops.step(x, m, Table([0], a=2.0), 0, out=weight.expand(3, 3)[:2] * 1.0, backend="reference")
    z = torch.zeros(2, 3, requires_grad=True)
    assert ops.step(x, m, Table([0], a=1.0, s=2.0), 0, noise=z).requires_grad


def test_inference_tensors(backend: str) -> None:
    with torch.inference_mode():
        x = ops.randn((2, 9), seed=0, backend=backend)
        assert x.is_inference()
        ops.randn((2, 9), seed=0, out=x, backend=backend)
        ops.step(x, x.clone(), Table([0], a=2.0), 0, out=x, backend=backend)
    assert torch.equal(x, 2 * ops.randn((2, 9), seed=0, backend=backend))


def test_negated_views() -> None:
    x = torch.zeros(1, 5)
    m = torch.complex(x, x + 1).conj().imag
    assert m.is_neg()
    assert torch.equal(ops.step(x, m, Table([0], q=1.0, b=1.0), 0), x - 1)


def test_default_device_does_not_reach_the_kernel() -> None:
    with torch.device("meta"):
        x = torch.zeros(1, 8, device="cpu")
        got = ops.step(x, x.clone(), Table([0], a=1.0, s=1.0), 0, seed=0)
    assert torch.equal(got, ops.randn((1, 8), seed=0, stream=1))


X, M = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
PLAIN, NOISY = Table([1, 0], a=1.0), Table([1, 0], a=1.0, s=1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"row": 2}, ValueError, "row 2", id="row-too-large"),
        pytest.param({"row": 0.0}, TypeError, "integer", id="row-float"),
        pytest.param({"table": None}, TypeError, "fastsample.Table", id="no-table"),
        pytest.param({"x": [1.0]}, TypeError, "x must be a tensor", id="x-list"),
        pytest.param({"row": -3}, ValueError, "row -3", id="row-too-small"),
        pytest.param({"model_output": (M,)}, TypeError, "must be a tensor", id="output-is-tuple"),
        pytest.param({"model_output": torch.zeros(2, 9, 4)}, ValueError, "twice its axis 1", id="output-3C"),
        pytest.param({"model_output": torch.zeros(1, 3, 4)}, ValueError, "model_output", id="output-broadcasts"),
        pytest.param({"model_output": M.long()}, TypeError, "floating point", id="output-int"),
        pytest.param({"model_output": M.to("meta")}, ValueError, "lies on meta", id="output-device"),
        pytest.param({"x": X.long()}, TypeError, "float32", id="x-int"),
        pytest.param({"x": X.half()}, TypeError, "float32", id="x-half"),
        pytest.param({"x": torch.zeros(0, 3)}, ValueError, "no zero", id="x-empty"),
        pytest.param({"x": torch.tensor(1.0), "model_output": torch.tensor(1.0)}, ValueError, "axis", id="x-0d"),
        pytest.param({"table": NOISY}, ValueError, "exactly one", id="no-noise"),
        pytest.param({"table": NOISY, "noise": X, "seed": 1}, ValueError, "exactly one", id="two-noises"),
        pytest.param({"table": NOISY, "noise": torch.zeros(2, 3)}, ValueError, "noise", id="noise-shape"),
        pytest.param({"table": NOISY, "noise": X.double()}, TypeError, "noise", id="noise-dtype"),
        pytest.param({"table": NOISY, "seed": [1, 2, 3]}, ValueError, "one per sample", id="seeds"),
        pytest.param({"out": torch.zeros(2, 3)}, ValueError, "out", id="out-shape"),
        pytest.param({"out": X.half()}, TypeError, "out", id="out-dtype"),
        pytest.param({"x0_out": X.double()}, TypeError, "x0_out", id="x0-dtype"),
        pytest.param({"input_out": X.long()}, TypeError, "input_out", id="input-dtype"),
        pytest.param({"backend": "triton"}, ValueError, "cannot run here", id="absent-backend"),
    ],
)
def test_bad_input_writes_nothing(backend: str, arguments: dict, error: type[Exception], message: str) -> None:
    out = torch.full((2, 3, 4), 7.0)
    call = {"x": X, "model_output": M, "table": PLAIN, "row": 0, "out": out, "backend": backend, **arguments}
    with pytest.raises(error, match=message):
        ops.step(**call)
    assert (out == 7).all()
