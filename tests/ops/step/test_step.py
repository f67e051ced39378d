"""ops.step: plain rows against float64 on every backend, conversions, memory, autograd and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import DDIM, Schedule, Table, ops
from fastsample.ops.backend import cpu_module
from support.formula import assert_matches, expected, normal
from support.golden import golden
from support.levels import LEVELS, at_level, needs_cpu, on_threads
from support.step_modes import DTYPES, KINDS, PLAIN_KINDS

_cpu = cpu_module()

SHAPES = [(1, 1), (3, 5), (1, 16, 7), (2, 3, 5, 7), (2, 4, 33, 31), (1, 2, 2048), (3, 1, 4099)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return normal(shape, 1), normal(shape, 2, dtype), normal(shape, 3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PLAIN_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(backend: str, shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    x, m, z = inputs(shape, dtype)
    table = Table([10, 0], **KINDS[name])
    entry = torch.full_like(x, math.nan)
    got = ops.step(x, m, table, 1, noise=z, x0_out=entry, backend=backend)
    want = expected(x, m, table, 1, z=z)
    assert_matches(got, want.state, want.state_error)
    assert_matches(entry, want.entry, want.entry_error)
    assert torch.equal(ops.step(x, m, table, 1, noise=z, backend=backend), got), "x0_out must not change x'"


@pytest.mark.parametrize("dtype", DTYPES)
def test_epsilon_of_a_model_of_epsilon_is_its_output(backend: str, dtype: torch.dtype) -> None:
    """x leaves the entry when a row is folded, however far out it lies; a limit brings it back."""
    x, m, _ = inputs((2, 3, 700), dtype)
    entry = torch.full_like(x, math.nan)
    ops.step(1e6 * x, m, Table([0], **KINDS["epsilon-entry"]), 0, x0_out=entry, backend=backend)
    assert torch.equal(entry, m.float())
    ops.step(1e6 * x, m, Table([0], **KINDS["clamped-epsilon-entry"]), 0, x0_out=entry, backend=backend)
    torch.testing.assert_close(entry, 1e6 * x / 0.6, rtol=1e-6, atol=2.0)  # x0 is at most 0.8


def test_an_entry_of_half_of_x0_leaves_the_next_state_alone(backend: str) -> None:
    """hx and h0 are the entry's alone, in rows that limit x0 and in those that do not."""
    x, m, z = inputs((2, 3, 700))
    for name in ("all-terms", "folded-noise"):
        plain = Table([0], **KINDS[name])
        want, x0, half = ops.step(x, m, plain, 0, noise=z, backend=backend), torch.empty_like(x), torch.empty_like(x)
        ops.step(x, m, plain, 0, noise=z, x0_out=x0, backend=backend)
        got = ops.step(x, m, plain.replace(h0=0.5), 0, noise=z, x0_out=half, backend=backend)
        assert torch.equal(got, want) and torch.equal(half, 0.5 * x0)


@needs_cpu
@pytest.mark.parametrize("name", PLAIN_KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_in_place_on_every_level_and_thread_count(name: str, shape: tuple[int, ...]) -> None:
    x, m, _ = inputs(shape, torch.bfloat16)
    table = Table([10, 0], **KINDS[name])
    results = set()
    for level in LEVELS:
        for threads in (1, 2, 3):
            with at_level(level), on_threads(threads):
                state, half = x.clone(), torch.full_like(x, math.nan, dtype=torch.float16)
                assert ops.step(state, m, table, 0, seed=11, out=state, input_out=half, backend="cpu") is state
                fresh = ops.step(x, m, table, 0, seed=11, backend="cpu")
            results.add((state.numpy().tobytes(), half.numpy().tobytes()))
            results.add((fresh.numpy().tobytes(), half.numpy().tobytes()))
    assert len(results) == 1


@pytest.mark.parametrize("size", [1, 3, 20, 4099, 40_000])
def test_noise_in_the_pass_is_randn_of_the_row_on_stream_1(backend: str, size: int) -> None:
    x, m, _ = inputs((3, size))
    table = Table([9, 5, 0], **KINDS["all-terms"])
    drawn = ops.step(x, m, table, 2, seed=40, backend=backend)
    given = ops.step(
        x, m, table, 2, noise=ops.randn(x.shape, seed=40, step=2, stream=1, backend=backend), backend=backend
    )
    assert torch.equal(drawn, given)
    alone = ops.step(x[1:2], m[1:2], table, -1, seed=40, index=1, backend=backend)
    assert torch.equal(drawn[1:2], alone), "a sample must not depend on its batch"


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_out_is_the_rounded_state(backend: str, dtype: torch.dtype) -> None:
    x, m, _ = inputs((3, 1000))
    x[0, :6] = torch.tensor([1e5, -1e5, 1e-6, 6e-8, 65519.0, 65520.0])
    m[0, :6] = 0
    table = Table([0], q=1.0, a=1.0)
    target = torch.full(x.shape, math.nan, dtype=dtype)
    state = ops.step(x, m, table, 0, input_out=target, backend=backend)
    assert torch.equal(target, state.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_value_converts_exactly(backend: str, dtype: torch.dtype) -> None:
    m = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, -1)
    table = Table([0], q=1.0, b=1.0)
    out = torch.full(m.shape, math.nan, dtype=dtype)
    state = ops.step(torch.zeros(m.shape), m, table, 0, input_out=out, backend=backend)
    assert torch.equal(state.nan_to_num(1.5), m.float().nan_to_num(1.5))
    assert torch.equal(state.isnan(), m.isnan()) and torch.equal(out.isnan(), m.isnan())
    assert torch.equal(out.nan_to_num(1.5), m.nan_to_num(1.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
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
    table = Table([0], **KINDS["clamped"])
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
    "h1": dict(p=0.5, q=0.5, b=0.9, c2=[0.0, 0.0, 0.0, 0.4], c3=[0.0, 0.0, 0.0, 0.2]),
    "h2": dict(p=0.5, q=0.5, b=0.9, c1=[0.0, 0.0, 0.0, 0.4], c3=[0.0, 0.0, 0.0, 0.2]),
    "h3": dict(p=0.5, q=0.5, b=0.9, c1=[0.0, 0.0, 0.0, 0.4], c2=[0.0, 0.0, 0.0, 0.2]),
    "variance": dict(p=0.5, q=0.5, b=0.9, s=0.3, g0=0.1),
    "variance-without-noise": dict(p=0.5, q=0.5, b=0.9, g0=0.1, g1=0.5),
    "everything": dict(),
}


@pytest.mark.parametrize("guidance", [None, 3.0], ids=["plain", "guided"])
@pytest.mark.parametrize("name", UNREAD)
def test_operands_with_coefficient_0_are_not_read(backend: str, name: str, guidance: float | None) -> None:
    shape = (2, 3, 70)
    table = Table([3, 2, 1, 0], **UNREAD[name])
    batch = 2 if guidance is None else 4
    operands = {
        "x": normal(shape, 1),
        "model_output": normal((batch, 3, 70), 2),
        "variance": normal((batch, 3, 70), 3),
        "noise": normal(shape, 4),
        "h1": normal(shape, 5),
        "h2": normal(shape, 6),
        "h3": normal(shape, 7),
    }

    def call() -> Tensor:
        return ops.step(
            operands["x"],
            torch.cat([operands["model_output"], operands["variance"]], dim=1),
            table,
            3,
            noise=operands["noise"],
            history=(operands["h1"], operands["h2"], operands["h3"]),
            guidance=guidance,
            backend=backend,
        )

    want = call()
    assert want.isfinite().all()
    spoilt = operands if name == "everything" else [next(one for one in operands if name.startswith(one))]
    for one in spoilt:
        operands[one] = torch.full_like(operands[one], math.nan)
    assert torch.equal(call(), want)


# Entries that leave something out: their columns, and what may be NaN.
ENTRIES_WITHOUT = {
    "x": (dict(q=0.5, h0=0.5), "x"),
    "x-limited": (dict(q=0.5, limit=2.0, h0=0.5), "x"),
    "x-thresholded": (dict(q=0.5, quantile=0.5, h0=0.5), "x"),
    "x-as-it-folds-away": (dict(p=1.25, q=-0.75, hx=1 / 0.6, h0=-0.8 / 0.6), "x"),
    "model_output": (dict(p=0.5, hx=0.25, h0=0.5), "m"),
    "model_output-limited": (dict(p=0.5, limit=2.0, hx=0.25, h0=0.5), "m"),
    "model_output-thresholded": (dict(p=0.5, quantile=0.5, hx=0.25, h0=0.5), "m"),
    "x0": (dict(p=0.5, q=0.5, hx=0.25, h0=0.0), "m"),
    "x0-limited": (dict(p=0.5, q=0.5, limit=2.0, hx=0.25, h0=0.0), "m"),
    "x0-thresholded": (dict(p=0.5, q=0.5, quantile=0.5, limit=2.0, hx=0.25, h0=0.0), "m"),
    "everything": (dict(p=0.5, q=0.5, limit=2.0, hx=0.0, h0=0.0), "x m"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ENTRIES_WITHOUT)
def test_what_an_entry_has_no_coefficient_of_does_not_enter_it(backend: str, name: str, dtype: torch.dtype) -> None:
    columns, unread = ENTRIES_WITHOUT[name]
    x, m, _ = inputs((2, 3, 70), dtype)
    want, got = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    ops.step(x, m, Table([0], **columns), 0, x0_out=want, backend=backend)
    assert want.isfinite().all()
    x, m = (torch.full_like(one, math.nan) if named in unread else one for one, named in ((x, "x"), (m, "m")))
    ops.step(x, m, Table([0], **columns), 0, x0_out=got, backend=backend)
    assert torch.equal(got, want)


def test_nan_from_the_model_survives_the_clamp(backend: str) -> None:
    x, m = torch.zeros(1, 37), torch.zeros(1, 37)
    m[0, 5] = math.nan
    got = ops.step(x, m, Table([0], q=1.0, b=1.0, limit=1.0), 0, backend=backend)
    assert got.isnan().nonzero().tolist() == [[0, 5]]


def test_float64_state_on_the_reference() -> None:
    x, m, z = (tensor.double() for tensor in inputs((2, 50)))
    table = Table([0], **KINDS["all-terms"])
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
