"""Every operand of ops.step - history, learned variance, guidance, thresholds, rows, scaled inputs - on every level."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import Table, ops
from support.formula import assert_matches, expected, normal
from support.levels import LEVELS, at_level, needs_cpu, on_threads
from support.step_modes import BASE, DTYPES, LAST, MIXED, MODES, alone, case

NAN = math.nan
SHAPES = [(1, 1), (3, 5), (2, 3, 5, 7), (1, 2, 2048), (3, 1, 4099)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MODES)
def test_matches_float64(backend: str, shape: tuple[int, ...], name: str) -> None:
    z = normal(shape, 6)
    for dtype in DTYPES:
        table, call = case(name, shape, dtype)
        want = expected(
            call["x"],
            call["model_output"],
            table,
            LAST,
            z=z,
            history=call["history"],
            guidance=call["guidance"],
            rescale=call["guidance_rescale"],
        )
        entry = torch.full(shape, NAN)
        got = ops.step(table=table, row=LAST, noise=z, x0_out=entry, backend=backend, **call)
        assert_matches(got, want.state, want.state_error)
        assert_matches(entry, want.entry, want.entry_error)
        without = ops.step(table=table, row=LAST, noise=z, backend=backend, **call)
        assert torch.equal(without, got), "x0_out must not change x'"


# The last is large enough for three threads.
@needs_cpu
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 3, 11), (3, 2, 20_011)], ids=str)
@pytest.mark.parametrize("name", MODES)
def test_same_bits_on_every_level_thread_count_batch_and_in_place(name: str, shape: tuple[int, ...]) -> None:
    table, call = case(name, shape, torch.bfloat16)
    results = set()
    for level in LEVELS:
        for threads in (1, 2, 3):
            with at_level(level), on_threads(threads):
                results |= {_run(table, call, in_place) for in_place in (False, True)}
    with at_level(LEVELS[-1]), on_threads(2):
        parts = [_run(table, alone(call, i), in_place=i == 1, index=i) for i in range(3)]
    results.add(tuple(b"".join(part) for part in zip(*parts, strict=True)))
    assert len(results) == 1


def _run(
    table: Table,
    call: dict[str, Any],
    in_place: bool,
    row: int | Tensor = LAST,
    index: int = 0,
    copies: int = 1,
) -> tuple[bytes, ...]:
    """The bytes of x', the entry and the next input, `copies` times, with noise drawn in the pass."""
    call = {**call, "x": call["x"].clone(), "history": tuple(h.clone() for h in call["history"])}
    out = call["x"] if in_place else torch.full_like(call["x"], NAN)
    entry = call["history"][-1] if in_place and call["history"] else torch.full_like(call["x"], NAN)
    half = torch.full((copies * len(out), *out.shape[1:]), NAN, dtype=torch.float16)
    outputs = {"out": out, "x0_out": entry, "input_out": half}
    ops.step(table=table, row=row, seed=11, index=index, backend="cpu", **call, **outputs)
    return out.numpy().tobytes(), entry.numpy().tobytes(), half.numpy().tobytes()


RECALLING = {name: "c3" in columns for name, (columns, *_) in MODES.items() if "c1" in columns}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        pytest.param(name, place, id=f"{name}-h{place + 1}")
        for name, three in RECALLING.items()
        for place in range(3 if three else 2)
    ],
)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
def test_the_entry_may_replace_any_history(backend: str, name: str, place: int, strided: bool) -> None:
    table, call = case(name, (2, 3, 5, 7))
    entry = torch.full((2, 3, 5, 7), NAN)
    want = ops.step(table=table, row=LAST, seed=3, x0_out=entry, backend=backend, **call)
    history = [one.clone() for one in call["history"]]
    if strided:
        history = [one.to(memory_format=torch.channels_last) for one in history]
    target, after = history[place], [*call["history"]]
    after[place] = entry
    got = ops.step(table=table, row=LAST, seed=3, x0_out=target, backend=backend, **{**call, "history": history})
    assert torch.equal(got, want)
    assert all(map(torch.equal, history, after)), "one is replaced, the others stay"


def test_only_the_history_that_the_row_reads_is_needed(backend: str) -> None:
    table, call = case("history-of-three", (2, 6))
    h1, h2, _ = call.pop("history")
    unread, entry = torch.full((2, 6), NAN), torch.full((2, 6), NAN)
    first = ops.step(table=table, row=0, x0_out=entry, backend=backend, **call)
    assert first.isfinite().all() and entry.isfinite().all()
    one = ops.step(table=table, row=1, history=[h1], backend=backend, **call)
    for more in ([h1, unread], [h1, unread, unread]):
        assert torch.equal(ops.step(table=table, row=1, history=more, backend=backend, **call), one), "c2 is 0 in row 1"
    two = ops.step(table=table, row=2, history=[h1, h2], backend=backend, **call)
    assert torch.equal(ops.step(table=table, row=2, history=[h1, h2, unread], backend=backend, **call), two)
    for row, given in ((1, []), (2, []), (2, [h1]), (3, []), (3, [h1]), (3, [h1, h2])):
        with pytest.raises(ValueError, match=f"row {row} needs the entries of {row} earlier"):
            ops.step(table=table, row=row, history=given, backend=backend, **call)


# The learned variance


def test_powers_of_two_in_the_pass_are_right_to_1_5_ulp(backend: str) -> None:
    """g1 = ln 2 and z = s = 1 make x' = 2^v; [-126, 127] is the range of normal float32."""
    v = torch.cat([torch.linspace(-126, 127, 300_001), normal((100_000,), 0), torch.arange(-126.0, 128)])
    m = torch.stack([torch.zeros_like(v), v])[None]
    table = Table([0], s=1.0, g1=math.log(2))
    got = ops.step(m[:, :1], m, table, 0, noise=torch.ones_like(m[:, :1]), backend=backend).double().flatten()
    want = torch.exp2(v.double())
    ulp = torch.exp2(torch.floor(v.double()) - 23)
    assert ((got - want).abs() / ulp).max() < 1.5
    whole = v == v.round()
    assert torch.equal(got[whole], want[whole]), "whole powers are exact"


def test_variances_beyond_float32_stay_finite_and_nan_stays_nan(backend: str) -> None:
    v = torch.tensor([1e4, 128.0, math.inf, -1e4, -127.0, -math.inf, NAN])
    m = torch.stack([torch.zeros_like(v), v])[None]
    table = Table([0], s=1.0, g1=math.log(2))
    got = ops.step(m[:, :1], m, table, 0, noise=torch.ones_like(m[:, :1]), backend=backend).flatten()
    assert got[:6].tolist() == [2.0**127] * 3 + [2.0**-126] * 3 and got[6].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_variance_from_given_and_from_drawn_noise_agree(backend: str, dtype: torch.dtype) -> None:
    table, call = case("learned", (3, 4, 1027), dtype)
    z = ops.randn((3, 4, 1027), seed=8, step=LAST, stream=1, backend=backend)
    given, kept = ops.step(table=table, row=LAST, noise=z, backend=backend, **call), z.clone()
    assert torch.equal(given, ops.step(table=table, row=LAST, seed=8, backend=backend, **call))
    assert torch.equal(z, kept), "the caller's noise is only read"


def test_guidance_takes_the_conditional_variance(backend: str) -> None:
    table, call = case("guided-learned", (2, 3, 40))
    want = ops.step(table=table, row=LAST, seed=1, backend=backend, **call)
    call["model_output"][:2, 3:] = NAN
    assert torch.equal(ops.step(table=table, row=LAST, seed=1, backend=backend, **call), want)


# Guidance


@pytest.mark.parametrize("phi", [0.0, 0.7], ids=["plain", "rescaled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_guidance_1_is_the_conditional_output_exactly(backend: str, dtype: torch.dtype, phi: float) -> None:
    columns = {**BASE, "limit": 0.8}
    x, conditional = normal((3, 1000), 1), normal((3, 1000), 2, dtype)
    unconditional = (1e4 * normal((3, 1000), 3)).to(dtype)  # large, so that a sum with it would lose digits
    m = torch.cat([unconditional, conditional])
    table = Table([0], **columns)
    want = ops.step(x, conditional, table, 0, backend=backend)
    assert torch.equal(ops.step(x, m, table, 0, guidance=1.0, guidance_rescale=phi, backend=backend), want)
    mixed = ops.step(x, m, table, 0, guidance=[1.0, 3.0, 1.0], guidance_rescale=phi, backend=backend)
    assert torch.equal(mixed[::2], want[::2]) and not torch.equal(mixed[1], want[1])


@pytest.mark.parametrize(
    "weights",
    [3.0, 3, [3.0, 3.0], (3, 3), torch.tensor(3.0), torch.tensor([3, 3]), torch.tensor([3.0, 3.0]).double()],
    ids=["float", "int", "list", "tuple", "0-d", "integers", "float64"],
)
def test_ways_to_write_a_weight(backend: str, weights: object) -> None:
    table, call = case("guided", (2, 7))
    want = ops.step(table=table, row=LAST, backend=backend, **{**call, "guidance": 3.0})
    assert torch.equal(ops.step(table=table, row=LAST, backend=backend, **{**call, "guidance": weights}), want)


# Rows of their own


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("shape", [(7, 2, 3), (7, 2, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_samples_at_rows_of_their_own_equal_each_alone(
    backend: str, shape: tuple[int, ...], guided: bool, dtype: torch.dtype
) -> None:
    rows = torch.tensor([3, 0, 1, -1, 2, 4, 0])
    batch = len(rows)
    x, *history = (normal(shape, i) for i in (1, 2, 3, 5))
    m = normal((2 * batch if guided else batch, 2 * shape[1], *shape[2:]), 4, dtype)
    call: dict[str, Any] = {"x": x, "model_output": m, "history": history, "guidance": None}
    if guided:
        call |= {"guidance": [7.5, 1.0, 2.0, 7.5, 0.0, 3.0, 7.5], "guidance_rescale": 0.7}
    buffers = {"x0_out": torch.full(shape, NAN), "input_out": torch.full(shape, NAN, dtype=torch.bfloat16)}
    got = ops.step(table=MIXED, row=rows, seed=20, backend=backend, **call, **buffers)
    drawn = [ops.randn((1, *shape[1:]), seed=20, index=i, step=k % 5, stream=1) for i, k in enumerate(rows.tolist())]
    given = ops.step(table=MIXED, row=rows, noise=torch.cat(drawn), backend=backend, **call)
    assert torch.equal(given, got) or backend == "reference", "the reference's own normals differ by 1 ulp"
    for i, row in enumerate(rows.tolist()):
        outputs = {name: torch.full_like(buffer[:1], NAN) for name, buffer in buffers.items()}
        want = ops.step(table=MIXED, row=row, seed=20, index=i, backend=backend, **alone(call, i), **outputs)
        assert torch.equal(got[i : i + 1], want), f"sample {i} in row {row}"
        for name, output in outputs.items():
            assert torch.equal(buffers[name][i : i + 1], output), f"{name} of sample {i} in row {row}"


@needs_cpu
@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 2, 12_007)], ids=str)
def test_rows_of_their_own_have_the_same_bits_on_every_level_and_thread_count(shape: tuple[int, ...]) -> None:
    rows = torch.tensor([3, 0, 1, 4, 2])
    x, *history = (normal(shape, i) for i in (1, 2, 3, 5))
    m = normal((10, 4, shape[2]), 4, torch.float16)
    call: dict[str, Any] = {"x": x, "model_output": m, "history": history, "guidance_rescale": 0.7}
    call["guidance"] = [7.5, 1.0, 2.0, 0.5, 3.0]
    results = set()
    for level in LEVELS:
        for threads in (1, 2, 3):
            with at_level(level), on_threads(threads):
                results |= {_run(MIXED, call, in_place, row=rows, copies=2) for in_place in (False, True)}
    assert len(results) == 1


@pytest.mark.parametrize("rows", [[2, 2], [0, 2], [-1, 1], [3, 4]], ids=str)
def test_rows_match_float64(backend: str, rows: list[int]) -> None:
    shape = (2, 3, 50)
    x, z, m, *history = (normal(shape, i) for i in range(6))
    m = torch.cat([m, normal(shape, 9)], dim=1)
    entry = torch.full(shape, NAN)
    given = torch.tensor(rows + rows)[::2] if rows[0] == rows[1] else torch.tensor(rows)
    got = ops.step(x, m, MIXED, given, noise=z, history=history, x0_out=entry, backend=backend)
    want = expected(x, m, MIXED, rows, z=z, history=history)
    assert_matches(got, want.state, want.state_error)
    assert_matches(entry, want.entry, want.entry_error)


def test_a_limit_without_a_quantile_is_a_clamp_beside_thresholded_rows(backend: str) -> None:
    table = Table([1, 0], q=1.0, b=1.0, quantile=[0.5, 0.0], limit=[math.inf, 3.0])
    m = torch.linspace(-6, 6, 7)[None]
    got = ops.step(torch.zeros_like(m), m, table, 1, backend=backend)
    assert torch.equal(got, m.clamp(-3, 3))


# The next model input


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
def test_the_next_input_is_scaled_rounded_once_and_doubled(
    backend: str, dtype: torch.dtype, twice: bool, strided: bool
) -> None:
    shape = (2, 3, 5, 67)
    table = Table([2, 1, 0], a=1.0, e=[9.0, 0.3, 1e-6])
    x = normal(shape, 1)
    target = torch.full((4 if twice else 2, *shape[1:]), NAN, dtype=dtype)
    if strided:
        target = target.to(memory_format=torch.channels_last)
    for row, scale in ((0, 0.3), (1, 1e-6), (2, 1.0)):
        state = ops.step(x, torch.zeros_like(x), table, row, input_out=target, backend=backend)
        want = (state * torch.tensor(scale)).to(dtype)
        assert all(torch.equal(half, want) for half in target.split(2)), row


def test_float64_states_scale_their_input_in_float64() -> None:
    x = normal((2, 9), 1).double()
    target = torch.full((2, 9), NAN, dtype=torch.float64)
    ops.step(x, torch.zeros_like(x), Table([1, 0], a=1.0, e=[1.0, 0.1]), 0, input_out=target)
    assert np.array_equal(target.numpy(), x.numpy() * 0.1)


def test_the_next_input_under_another_default_device(backend: str) -> None:
    x = normal((1, 9), 1)
    target = torch.full_like(x, NAN)
    table = Table([1, 0], a=1.0, e=[1.0, 0.5], quantile=0.5)
    with torch.device("meta"):
        ops.step(x, torch.cat([x, x]), table, 0, guidance=2.0, input_out=target, backend=backend)
    assert torch.equal(target, x * 0.5)
