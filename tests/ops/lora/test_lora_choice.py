"""Which arithmetic lora_linear uses: the rule, the measurement, overrides, and lora_linear by torch's own product."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample
from fastsample.ops.backend import cpu_module
from fastsample.ops.lora import choice as lora_choice
from fastsample.ops.lora import lora_linear, weights
from fastsample.ops.lora.adapters import LowRank, pack_adapters
from fastsample.ops.lora.layout import TORCH
from fastsample.ops.lora.weights import pack_linear
from support.levels import needs_cpu
from support.lora_formula import (
    DTYPES,
    MEASURED,
    assert_as_good_as_torch,
    assert_same,
    exact,
    problem,
)

_cpu = cpu_module()

pytestmark = needs_cpu
NAN = math.nan


# The rule


@pytest.mark.parametrize(
    ("seconds", "want"),
    [
        pytest.param({"amx": [1, 1, 1]}, "amx", id="alone"),
        pytest.param({"amx": [1, 1, 1], "torch": [0.67, 0.67, 0.67]}, "amx", id="below-1.5"),
        pytest.param({"amx": [1, 1, 1], "torch": [0.66, 0.66, 0.66]}, "torch", id="above-1.5"),
        pytest.param({"amx": [3, 3, 3], "torch": [2, 2, 2]}, "amx", id="exactly-1.5"),
        pytest.param({"amx": [9, 9, 1], "torch": [1, 1, 0.9]}, "amx", id="the-least-counts"),
        pytest.param({"amx": [9, 9, 9], "torch": [99, 99, 1]}, "torch", id="one-quiet-round"),
        pytest.param({"amx": [9, 9], "torch": [1, 1]}, "amx", id="too-few-rounds"),
        pytest.param({"amx": [], "torch": []}, "amx", id="no-round"),
        pytest.param({"amx": [9] * 3, "avx512": [2] * 3, "torch": [1] * 3}, "torch", id="two-beat-it"),
        pytest.param({"amx": [9] * 3, "avx512": [1] * 3, "torch": [1.1] * 3}, "avx512", id="a-level-is-the-fastest"),
    ],
)
def test_decision(seconds: dict[str, list[float]], want: str) -> None:
    assert lora_choice.decide("amx", seconds) == want


@pytest.mark.parametrize(
    ("levels", "want"),
    [
        (["avx512-bf16", "avx512", "avx2", "scalar"], ["avx512-bf16", "avx512", "torch"]),
        (["avx512-bf16", "avx2", "scalar"], ["avx512-bf16", "torch"]),
        (["avx2", "scalar"], ["avx2", "torch"]),
        (["scalar"], ["scalar", "torch"]),
    ],
    ids=["bfloat16", "float32", "avx2", "scalar"],
)
def test_candidates(levels: list[str], want: list[str]) -> None:
    assert lora_choice.candidates(levels) == want


@pytest.mark.parametrize("cost", [1e-5, 3e-4, 7e-4, 0.5], ids=str)
def test_rounds_keep_to_their_budget(cost: float) -> None:
    """A clock that the calls move: a takes `cost`, b twice that."""
    now, order = [0.0], []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += seconds

    calls = {"a": lambda: call("a", cost), "b": lambda: call("b", 2 * cost)}
    found = lora_choice.rounds(calls, lambda: now[0])
    count = len(found["a"])
    assert order == ["a", "b"] * count
    assert count == 1 or now[0] <= lora_choice.BUDGET * (1 + 1e-9)
    assert found["a"] == pytest.approx([cost] * count) and found["b"] == pytest.approx([2 * cost] * count)
    assert now[0] + 3 * cost > lora_choice.BUDGET * (1 - 1e-9), "there was no time for another"


# The measurement


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice made yet."""
    monkeypatch.setattr(lora_choice, "_made", {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_choice(forgotten: None, dtype: torch.dtype) -> None:
    before, threads = _cpu.lora_isa(lora_choice.DTYPE_CODES[dtype]), torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a product that does not fit where it is written to
        found = lora_choice.choice(dtype)
    assert found.first == _cpu.lora_isas(lora_choice.DTYPE_CODES[dtype])[0]
    assert list(found.seconds) == lora_choice.candidates(_cpu.lora_isas(lora_choice.DTYPE_CODES[dtype]))
    assert found.name == lora_choice.decide(found.first, found.seconds)
    assert all(0 < seconds < 1 for seconds in itertools.chain(*found.seconds.values()))
    assert lora_choice.choice(dtype) is found
    assert torch.get_num_threads() == threads
    in_use = before if found.name in (found.first, "torch") else found.name
    assert _cpu.lora_isa(lora_choice.DTYPE_CODES[dtype]) == in_use
    _cpu.set_lora_isa(lora_choice.DTYPE_CODES[dtype], before)


def test_torch_keeps_to_one_thread_where_it_is_told_to() -> None:
    """In that thread alone, whatever number torch was given before."""
    threads = torch.get_num_threads()

    def counts() -> tuple[int, int]:
        before = torch.get_num_threads()
        assert _cpu.keep_to_this_thread()
        return before, torch.get_num_threads()

    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(counts).result() == (3, 1)
        with ThreadPoolExecutor(1) as pool:
            assert (torch.get_num_threads(), pool.submit(torch.get_num_threads).result()) == (3, 3)
    finally:
        torch.set_num_threads(threads)


def test_threads_that_ask_at_once_share_one_choice(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(lora_choice, "_make", lambda dtype: calls.append(dtype) or lora_choice.Choice("x", "x", {}, 0))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lora_choice.choice, [torch.float32] * 32))
    assert calls == [torch.float32] and all(one is found[0] for one in found)


def test_a_level_that_wins_is_set(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _cpu.lora_isa(2)
    monkeypatch.setattr(lora_choice, "_make", lambda dtype: lora_choice.Choice("scalar", before, {}, 0))
    lora_choice.choice(torch.bfloat16)
    try:
        assert _cpu.lora_isa(2) == "scalar"
    finally:
        _cpu.set_lora_isa(2, before)


MODES = """
import json, os, threading, torch
torch.set_num_threads(2)
import fastsample
from fastsample.ops.lora import choice as lora_choice, weights
from torch._subclasses.fake_tensor import FakeTensorMode
assert not lora_choice._made, "importing measures nothing"
with torch.device("meta"), torch.autocast("cpu"), FakeTensorMode():
    lora_choice.choice(torch.float32)
torch.use_deterministic_algorithms(True)
with torch.inference_mode():
    weights.pack_linear([torch.ones(3, 3).half()])
compiled = torch.compile(lambda w: weights.pack_linear([w]).unpack()[0] + 1, backend="eager")
assert torch.equal(compiled(torch.ones(3, 3).bfloat16()), torch.full((3, 3), 2.0).bfloat16())
assert len(lora_choice._made) == 3 and all(one.seconds for one in lora_choice._made.values())
assert fastsample.backends()["cpu"]["lora"] == {str(k)[6:]: v.name for k, v in lora_choice._made.items()}
print(json.dumps(fastsample.backends()["cpu"]["lora"]))
"""
FORCED = """
import fastsample, json, torch
from fastsample.ops.lora import choice as lora_choice
found = fastsample.backends()["cpu"]["lora"]
assert not lora_choice._made
print(json.dumps(found))
"""


def told(code: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_modes_of_torch_do_not_reach_the_measurement() -> None:
    """Nor does a level that a test has set: a fresh process."""
    assert set(told(MODES, FASTSAMPLE_CPU_ISA="")) == {"float32", "float16", "bfloat16"}


def test_an_override_is_the_choice_for_every_dtype() -> None:
    assert told(FORCED, FASTSAMPLE_CPU_ISA="scalar") == dict.fromkeys(("float32", "float16", "bfloat16"), "scalar")


def test_backends_tell_the_choice_and_why_there_is_no_amx() -> None:
    cpu = fastsample.backends()["cpu"]
    assert set(cpu["lora"]) == {"float32", "float16", "bfloat16"}
    assert set(cpu["lora"].values()) <= {*cpu["isas"], "torch"}
    assert (cpu["amx"] == "") == ("amx" in cpu["isas"])


# lora_linear by torch


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "chosen", lambda dtype: "torch")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
@pytest.mark.parametrize(
    ("rows", "k", "ns", "rank"),
    [
        (77, 320, (96, 65, 33), 16),
        (29, 33, (17, 5), 3),
        (15, 1281, (96,), 130),
        (1, 1, (1,), 1),
        (0, 31, (5, 1), 4),
        (14, 64, (32, 32), None),
    ],
    ids=str,
)
def test_error_against_float64(
    by_torch: None, rows: int, k: int, ns: tuple[int, ...], rank: int | None, dtype: torch.dtype
) -> None:
    p = problem(MEASURED, k, ns, (rank,), dtype)
    packed, adapters = p.packs()
    assert packed.layout == TORCH and "cpu" in packed.offers
    around = torch.full((rows + 2, k + 6), NAN, dtype=dtype)
    around[1:-1, 3:-3] = p.x[:rows]
    assert_as_good_as_torch(lora_linear(around[1:-1, 3:-3], packed, adapters, backend="cpu"), p, rows)


@each_dtype
@pytest.mark.parametrize("k", [32, 33, 34, 68, 80])
def test_nan_stays_in_its_row(by_torch: None, k: int, dtype: torch.dtype) -> None:
    p = problem(MEASURED, k, (17, 5), (3,), dtype)
    x = p.x[:29].clone()
    x[14] = NAN
    others = torch.arange(29) != 14
    for y, clean in zip(lora_linear(x, *p.packs(), backend="cpu"), exact(p, p.x[:29]), strict=True):
        assert y[14].isnan().all()
        torch.testing.assert_close(y[others].double(), clean[others], rtol=0.02, atol=0.05)


@each_dtype
@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize(
    "index",
    [[-1, 0, 0, 1, 2], [2, 0, -1, 1, 0], [1, 1, 1, 1, 1], [-1, -1, -1, -1, -1], [2], []],
    ids=["sorted", "unsorted", "all-of-one", "none", "one-sample", "no-samples"],
)
def test_an_adapter_per_sample(by_torch: None, index: list[int], rows: int, dtype: torch.dtype) -> None:
    """Equal to one call per sample with that sample's adapter alone. The second linear of a group may have none."""
    p = problem(65, 33, (17, 5), (3, 16, 4), dtype)
    packed, adapters = p.packs()
    x = p.x[: len(index) * rows].view(len(index), rows, 33)
    chosen = torch.tensor(index, dtype=torch.int64)
    got = lora_linear(x, packed, adapters, adapter_index=chosen, backend="cpu")
    assert [y.shape for y in got] == [(len(index), rows, n) for n in (17, 5)]
    for i, g in enumerate(index):
        alone = pack_adapters(packed, [p.groups[g]]) if g >= 0 else None
        assert_same([y[i] for y in got], lora_linear(x[i], packed, alone, backend="cpu"), "torch")


def test_a_broken_adapter_reaches_its_own_samples_alone(by_torch: None) -> None:
    p = problem(24, 33, (17,), (3, 4), torch.bfloat16)
    broken = [[one and one._replace(up=torch.full_like(one.up, NAN)) for one in group] for group in p.groups[:1]]
    packed = p.packed()
    adapters = pack_adapters(packed, [*broken, p.groups[1]])
    (y,) = lora_linear(p.x.view(4, 6, 33), packed, adapters, adapter_index=torch.tensor([0, 1, -1, 0]), backend="cpu")
    assert [bool(sample.isnan().any()) for sample in y] == [True, False, False, True]


@pytest.mark.parametrize("index", [[0, 3], [-2, 0], [2**40, 0]], ids=str)
def test_an_index_out_of_range(by_torch: None, index: list[int]) -> None:
    p = problem(24, 33, (17, 5), (3, 16, 4), torch.float32)
    packed, adapters = p.packs()
    with pytest.raises(IndexError, match=r"adapter_index\[.\] is .*: there are 3 groups of adapters, and -1 is none"):
        lora_linear(p.x.view(2, 12, 33), packed, adapters, adapter_index=torch.tensor(index), backend="cpu")


@each_dtype
def test_unpacking_gives_the_same_bits(by_torch: None, dtype: torch.dtype) -> None:
    weights = [problem(5, 33, (n,), (None,), dtype).weights[0] for n in (17, 1)]
    packed = pack_linear(weights)
    assert all(map(torch.equal, packed.unpack(), weights))
    assert torch.equal(packed.linear(1).unpack()[0], weights[1])


@each_dtype
def test_update_in_place(by_torch: None, dtype: torch.dtype) -> None:
    p, other = (problem(24, 33, (17, 5), (3, 4), dtype, seed) for seed in (0, 1))
    packed, adapters = p.packs()
    assert adapters is not None
    adapters.update(packed, other.groups)
    x, index = p.x.view(2, 12, 33), torch.tensor([1, 0])
    got = lora_linear(x, packed, adapters, adapter_index=index)
    want = lora_linear(x, packed, pack_adapters(packed, other.groups), adapter_index=index)
    assert all(map(torch.equal, got, want))


def test_autocast_changes_nothing(by_torch: None) -> None:
    """As with the kernels: the weights' dtype says what is computed."""
    p = problem(24, 32, (17, 5), (4,), torch.float32)
    packed, adapters = p.packs()
    want = lora_linear(p.x, packed, adapters)
    with torch.autocast("cpu"):
        got = lora_linear(p.x, packed, adapters)
    assert all(map(torch.equal, got, want))


def test_gradients_go_through_the_reference(by_torch: None) -> None:
    p = problem(24, 32, (17,), (4,), torch.float32)
    x = p.x.clone().requires_grad_()
    (y,) = lora_linear(x, *p.packs())
    y.sum().backward()
    one = p.groups[0][0]
    assert isinstance(one, LowRank) and x.grad is not None
    want = (p.weights[0].double() + one.up.double() @ (one.scale * one.down.double())).sum(0)
    torch.testing.assert_close(x.grad.double(), want.expand(24, 32), rtol=1e-5, atol=1e-5)


def test_compiled(by_torch: None) -> None:
    p = problem(24, 33, (17, 5), (3, 4), torch.bfloat16)
    packed, adapters = p.packs()

    def call(x: Tensor, index: Tensor) -> Sequence[Tensor]:
        return [2 * y for y in lora_linear(x + 0, packed, adapters, adapter_index=index)]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for index in ([1, -1], [0, 1]):
            chosen = torch.tensor(index)
            got, want = (run(p.x.view(2, 12, 33), chosen) for run in (compiled, call))
            assert all(map(torch.equal, got, want))
    torch.compiler.reset()
