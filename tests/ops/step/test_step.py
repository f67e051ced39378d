"""ops.step: plain rows against float64 on every backend, conversions, memory, autograd and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import DDIM, Schedule, Table, ops
from fastsample.ops.backend import _cpu
from support.formula import assert_matches, expected, normal
from support.golden import golden
from support.levels import LEVELS

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
    return normal(shape, 1), normal(shape, 2, dtype), normal(shape, 3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_matches_float64(backend: str, shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    x, m, z = inputs(shape, dtype)
    table = Table([10, 0], **ROWS[name])
    x0 = torch.full_like(x, math.nan)
    got = ops.step(x, m, table, 1, noise=z, x0_out=x0, backend=backend)
    want = expected(x, m, table, 1, z=z)
    assert_matches(got, want.state, want.state_error)
    assert_matches(x0, want.x0, want.x0_error)
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
    alone = ops.step(x[1:2], m[1:2], table, -1, seed=40, index=1, backend=backend)
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


# Each column that is left out makes one operand's coefficient 0.
UNREAD = {
    "x": dict(q=0.5, b=0.9, d=0.3),
    "x-limited": dict(q=0.5, b=0.9, d=0.3, limit=2.0),
    "x-thresholded": dict(q=0.5, b=0.9, d=0.3, quantile=0.5),
    "model_output": dict(p=0.5, a=0.2, b=0.9),
    "model_output-limited": dict(p=0.5, a=0.2, b=0.9, limit=2.0),
    "model_output-thresholded": dict(p=0.5, a=0.2, b=0.9, quantile=0.5),
    "model_output-for-x0-alone": dict(p=0.5, q=0.5, a=0.2, limit=2.0),
    "x-for-x0-alone": dict(p=0.5, q=0.5, d=0.2, limit=2.0),
    "noise": dict(p=0.5, q=0.5, a=0.2, b=0.9),
    "h1": dict(p=0.5, q=0.5, b=0.9, c2=[0.0, 0.0, 0.4]),
    "h2": dict(p=0.5, q=0.5, b=0.9, c1=[0.0, 0.0, 0.4]),
    "variance": dict(p=0.5, q=0.5, b=0.9, s=0.3, g0=0.1),
    "variance-without-noise": dict(p=0.5, q=0.5, b=0.9, g0=0.1, g1=0.5),
    "everything": dict(),
}


@pytest.mark.parametrize("guidance", [None, 3.0], ids=["plain", "guided"])
@pytest.mark.parametrize("name", UNREAD)
def test_operands_with_coefficient_0_are_not_read(backend: str, name: str, guidance: float | None) -> None:
    shape = (2, 3, 70)
    table = Table([2, 1, 0], **UNREAD[name])
    batch = 2 if guidance is None else 4
    operands = {
        "x": normal(shape, 1),
        "model_output": normal((batch, 3, 70), 2),
        "variance": normal((batch, 3, 70), 3),
        "noise": normal(shape, 4),
        "h1": normal(shape, 5),
        "h2": normal(shape, 6),
    }

    def call() -> Tensor:
        return ops.step(
            operands["x"],
            torch.cat([operands["model_output"], operands["variance"]], dim=1),
            table,
            2,
            noise=operands["noise"],
            history=(operands["h1"], operands["h2"]),
            guidance=guidance,
            backend=backend,
        )

    want = call()
    assert want.isfinite().all()
    spoilt = operands if name == "everything" else [next(one for one in operands if name.startswith(one))]
    for one in spoilt:
        operands[one] = torch.full_like(operands[one], math.nan)
    assert torch.equal(call(), want)


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
    want = expected(x, m, table, 0, z=z)
    assert got.dtype == torch.float64
    # float64 rounds 2^29 times more finely.
    assert_matches(got, want.state, want.state_error * 2.0**-29)


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


@pytest.mark.parametrize("packed", [False, True], ids=["strided", "packed"])
def test_negated_views(backend: str, packed: bool) -> None:
    def negated(value: float) -> Tensor:
        plain = torch.full((2, 5), -value)
        view = plain._neg_view() if packed else torch.complex(plain, plain).conj().imag
        assert view.is_neg() and view.is_contiguous() == packed
        return view

    table = Table([1, 0], a=1.0, q=1.0, b=10.0, c1=[0.0, 100.0], s=1000.0)
    x, m, h, z, out, x0 = (negated(value) for value in (1.0, 2.0, 3.0, 4.0, 0.0, 0.0))
    got = ops.step(x, m, table, 1, history=[h], noise=z, out=out, x0_out=x0, backend=backend)
    assert torch.equal(got, torch.full((2, 5), 4321.0)) and torch.equal(x0, torch.full((2, 5), 2.0))


def test_default_device_does_not_reach_the_kernel() -> None:
    with torch.device("meta"):
        x = torch.zeros(1, 8, device="cpu")
        got = ops.step(x, x.clone(), Table([0], a=1.0, s=1.0), 0, seed=0)
    assert torch.equal(got, ops.randn((1, 8), seed=0, stream=1))


X, M = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
TWICE = torch.zeros(4, 3, 4)
PLAIN, NOISY = Table([1, 0], a=1.0), Table([1, 0], a=1.0, s=1.0)
LEARNED, RECALLS = Table([1, 0], a=1.0, s=1.0, g1=1.0), Table([1, 0], c1=[0.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"row": 2}, ValueError, "row 2", id="row-too-large"),
        pytest.param({"row": 0.0}, TypeError, "row must be an int or an int64 tensor", id="row-float"),
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
        pytest.param({"table": NOISY, "noise": X, "seed": 1}, ValueError, "noise= or seed=, not both", id="two-noises"),
        pytest.param({"table": NOISY, "noise": torch.zeros(2, 3)}, ValueError, "noise", id="noise-shape"),
        pytest.param({"table": NOISY, "noise": X.double()}, TypeError, "noise", id="noise-dtype"),
        pytest.param({"table": NOISY, "seed": [1, 2, 3]}, ValueError, "seed must be .* one per sample", id="seeds"),
        pytest.param({"table": NOISY, "index": [1, 2, 3]}, ValueError, "index must be .* one per sample", id="places"),
        pytest.param({"seed": 1.5}, TypeError, "seed must be", id="seed-that-no-row-reads"),
        pytest.param({"index": -1}, ValueError, "index must", id="place-that-no-row-reads"),
        pytest.param({"out": torch.zeros(2, 3)}, ValueError, "out", id="out-shape"),
        pytest.param({"out": X.half()}, TypeError, "out", id="out-dtype"),
        pytest.param({"x0_out": X.double()}, TypeError, "x0_out", id="x0-dtype"),
        pytest.param({"x0_out": [1.0]}, TypeError, "x0_out must be a tensor", id="x0-list"),
        pytest.param({"x0_out": X.to("meta")}, ValueError, "x0_out lies on meta", id="x0-device"),
        pytest.param({"input_out": torch.zeros(6, 3, 4)}, ValueError, "or twice its batch", id="input-thrice"),
        pytest.param({"row": torch.tensor([0, 2])}, ValueError, r"\[0, 2\] are not all inside", id="rows-too-large"),
        pytest.param({"row": torch.tensor([0, -3])}, ValueError, r"\[0, -3\] are not all", id="rows-too-small"),
        pytest.param({"row": torch.tensor([0, 1, 0])}, ValueError, "one per sample", id="rows-too-many"),
        pytest.param({"row": torch.tensor([[0], [1]])}, ValueError, "one per sample", id="rows-2d"),
        pytest.param({"row": torch.tensor([0.0, 1.0])}, TypeError, "int64", id="rows-float"),
        pytest.param({"row": torch.tensor([0, 1]).int()}, TypeError, "int64", id="rows-int32"),
        pytest.param({"row": torch.zeros(2, dtype=torch.int64, device="meta")}, TypeError, "CPU", id="rows-device"),
        pytest.param({"model_output": TWICE}, ValueError, "model_output must have x's shape", id="unasked-guidance"),
        pytest.param({"guidance": 2.0, "model_output": torch.zeros(6, 3, 4)}, ValueError, "4 samples", id="guided-3B"),
        pytest.param({"guidance": 2.0}, ValueError, "unconditional and the conditional half, 4 samples", id="guided-B"),
        pytest.param(
            {"guidance": 2.0, "model_output": torch.zeros(4, 3, 5)}, ValueError, "twice the batch", id="guided"
        ),
        pytest.param({"guidance": "much"}, TypeError, "guidance must be a number or one per sample", id="weight-text"),
        pytest.param({"guidance": [1.0, 2.0, 3.0]}, ValueError, "one per sample; got", id="weights-too-many"),
        pytest.param({"guidance": [[1.0], [2.0]]}, ValueError, "one per sample; got", id="weights-2d"),
        pytest.param({"guidance": math.nan}, ValueError, "guidance must be finite", id="weight-nan"),
        pytest.param({"guidance": [1.0, -math.inf]}, ValueError, "guidance must be finite", id="weight-infinite"),
        *[
            pytest.param(
                {"guidance": 2.0, "model_output": TWICE, "guidance_rescale": phi},
                ValueError,
                r"guidance_rescale must lie in \[0, 1\]",
                id=f"phi-{phi}",
            )
            for phi in (1.01, -0.01, math.nan)
        ],
        pytest.param({"guidance_rescale": 0.5}, ValueError, "guidance_rescale needs guidance=", id="phi-alone"),
        pytest.param({"table": LEARNED, "seed": 1}, ValueError, "must have 6 channels in axis 1", id="no-variance"),
        pytest.param(
            {"table": LEARNED, "seed": 1, "model_output": TWICE, "guidance": 2.0},
            ValueError,
            "must have 6 channels in axis 1",
            id="no-guided-variance",
        ),
        pytest.param(
            {"table": LEARNED, "seed": 1, "row": torch.tensor([0, 1])}, ValueError, "6 channels", id="rows-no-variance"
        ),
        pytest.param({"table": RECALLS, "row": 1}, ValueError, "row 1 needs the x0 of 1", id="no-history"),
        pytest.param({"table": RECALLS, "row": torch.tensor([0, 1])}, ValueError, "needs the x0", id="rows-no-history"),
        pytest.param({"history": [X[:1]]}, ValueError, r"history\[0\] must have x's shape", id="history-shape"),
        pytest.param(
            {"history": [X, X.double()]}, TypeError, r"history\[1\] must be torch.float32", id="history-dtype"
        ),
        pytest.param({"history": [None]}, TypeError, r"history\[0\] must be a tensor", id="history-none"),
        pytest.param({"history": [X, X, X]}, ValueError, "at most 2 earlier rows, got 3", id="history-too-long"),
        *[
            pytest.param(
                {name: torch.zeros(2, 3, 1).expand(2, 3, 4)}, ValueError, f"{name} is expanded", id=f"{name}-expanded"
            )
            for name in ("out", "x0_out", "input_out")
        ],
        pytest.param({"input_out": X.long()}, TypeError, "input_out", id="input-dtype"),
        pytest.param({"backend": "cuda"}, ValueError, "cannot run", id="absent-backend"),
    ],
)
def test_bad_input_writes_nothing(backend: str, arguments: dict, error: type[Exception], message: str) -> None:
    outputs = {name: torch.full((2, 3, 4), 7.0) for name in ("out", "x0_out", "input_out")}
    call = {"x": X, "model_output": M, "table": PLAIN, "row": 0, "backend": backend, **outputs, **arguments}
    with pytest.raises(error, match=message):
        ops.step(**call)
    assert all((one == 7).all() for one in outputs.values())
