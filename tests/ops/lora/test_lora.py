"""lora_linear on every backend and level: errors against float64, tails, strides, adapters per sample, packing."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample.ops.lora import lora_linear
from fastsample.ops.lora.adapters import LowRank, pack_adapters
from fastsample.ops.lora.weights import pack_linear
from support.levels import LEVELS, LORA_LEVELS, at_level, needs_cpu, on_threads
from support.lora_formula import (
    DTYPES,
    MEASURED,
    Problem,
    assert_as_good_as_torch,
    assert_same,
    exact,
    problem,
)
from support.lora_memory import LAYOUTS, layouts

pytestmark = [pytest.mark.amx_on_cpu, pytest.mark.usefixtures("nan_filled_new_empty")]

NAN = math.nan
ROWS = (0, 1, 2, 13, 14, 15, 29, 77)
KS = (1, 2, 3, 31, 33, 320, 385, 769, 1281)
NS = (1, 5, 16, 17, 31, 32, 33, 65, 96)
RANKS = (None, 1, 3, 4, 16, 17, 130)
COUNTS = (1, 2, 3)


def _cases(count: int) -> list[Any]:
    """Every value of every axis several times, beside ever other values of the others."""
    chance = random.Random(1)
    axes = [[axis[i % len(axis)] for i in range(count)] for axis in (ROWS, KS, RANKS, COUNTS, NS, NS, NS)]
    for axis in axes:
        chance.shuffle(axis)
    found = [(m, k, tuple(ns[:linears]), r) for m, k, r, linears, *ns in zip(*axes, strict=True)]
    found += [(77, 1281, (96, 65, 33), 130), (1, 1, (1,), 1), (128, 320, (320, 96), 128), (1, 769, (33,), 17)]
    return [pytest.param(*case, id=f"{case[0]}x{case[1]}-{'+'.join(map(str, case[2]))}-r{case[3]}") for case in found]


CASES = _cases(44)


def within_nan(x: Tensor) -> Tensor:
    """x with NaN on all sides: before and after each row, before the first and after the last."""
    around = torch.full((len(x) + 32, x.shape[1] + 64), NAN, dtype=x.dtype)
    around[16 : 16 + len(x), 32 : 32 + x.shape[1]] = x
    return around[16 : 16 + len(x), 32 : 32 + x.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "k", "ns", "rank"), CASES)
def test_error_against_float64(
    backend: str, dtype: torch.dtype, rows: int, k: int, ns: tuple[int, ...], rank: int | None
) -> None:
    p = problem(MEASURED, k, ns, (rank,), dtype)
    packed, adapters = p.packs()
    got = lora_linear(within_nan(p.x[:rows]), packed, adapters, backend=backend)
    assert_as_good_as_torch(got, p, rows)


def whole(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-1, 2, shape)).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tail_is_exact(backend: str, dtype: torch.dtype) -> None:
    """Sums of small integers are exact in any order: |y| <= 37 + 37 * 5 / 2 < 128, halves, 8 bits: also in bfloat16."""
    for n in (*range(1, 36), 63, 64, 65, 95):
        k, r = 1 + n % 37, n % 6
        weights = [whole(size, k, seed=size).to(dtype) for size in (n, 1 + n % 7)]
        factors = [LowRank(whole(r, k, seed=1).to(dtype), whole(len(w), r, seed=2).to(dtype), half) for w in weights]
        packed = pack_linear(weights)
        adapters = pack_adapters(packed, [factors]) if r else None
        for rows in range(0, 31, 1 if n in (1, 32, 33) else 5):
            x = whole(rows, k, seed=3).to(dtype)
            for y, weight, one in zip(lora_linear(x, packed, adapters, backend=backend), weights, factors, strict=True):
                want = x.double() @ weight.double().T + 0.5 * (x.double() @ one.down.double().T) @ one.up.double().T
                assert torch.equal(y.double(), want), (rows, k, n, r)


half = torch.tensor(0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_of_a_call_with_nan_is_left_behind(backend: str, dtype: torch.dtype) -> None:
    """Scratch memory keeps what the last call wrote: here NaN in every row, column and rank that a tail may touch."""
    small, large = problem(MEASURED, 33, (17, 5), (3,), dtype), problem(MEASURED, 1281, (96, 65), (130,), dtype)
    want = lora_linear(small.x[:15], *small.packs(), backend=backend)
    broken = lora_linear(torch.full_like(large.x, NAN), *large.packs(), backend=backend)
    assert all(y.isnan().all() for y in broken)
    got = lora_linear(small.x[:15], *small.packs(), backend=backend)
    assert all(torch.equal(y, other) for y, other in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(backend: str, dtype: torch.dtype) -> None:
    p = problem(MEASURED, 33, (17, 5), (3,), dtype)
    x = p.x[:29].clone()
    x[14, 5] = NAN
    for y, clean in zip(lora_linear(x, *p.packs(), backend=backend), exact(p, p.x[:29]), strict=True):
        assert y[14].isnan().all()
        others = torch.arange(29) != 14
        torch.testing.assert_close(y[others].double(), clean[others], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_x(backend: str, name: str, dtype: torch.dtype) -> None:
    p = problem(MEASURED, 33, (17, 5), (3,), dtype)
    x = layouts(p.x[:24])[name]
    got = lora_linear(x, *p.packs(), backend=backend)
    want = lora_linear(x.reshape(-1, 33).contiguous(), *p.packs(), backend=backend)
    assert [y.shape for y in got] == [(*x.shape[:-1], n) for n in (17, 5)]
    assert_same([y.reshape(-1, y.shape[-1]) for y in got], want, backend)


@pytest.mark.parametrize("level", LORA_LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacking_gives_the_same_bits(level: str, dtype: torch.dtype) -> None:
    """Of whatever 16 or 32 bits: payloads of NaN, -0, infinities and subnormals are among them."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for k in (1, 2, 3, 31, 33, 320):
        made = torch.Generator().manual_seed(k)
        limits = torch.iinfo(bits)
        weights = [
            torch.randint(limits.min, limits.max + 1, (n, k), generator=made, dtype=torch.int64).to(bits).view(dtype)
            for n in (1, 5, 32, 33, 96)
        ]
        weights.append(weights[-1].T.contiguous().T)
        packed = pack_linear(weights)
        for i, (weight, unpacked) in enumerate(zip(weights, packed.unpack(), strict=True)):
            assert torch.equal(unpacked.view(bits), weight.view(bits))
            (alone,) = packed.linear(i).unpack()
            assert torch.equal(alone.view(bits), weight.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_linear_of_several_shares_their_memory(backend: str, dtype: torch.dtype) -> None:
    p = problem(MEASURED, 33, (17, 5, 33), (None,), dtype)
    packed = p.packed()
    got = lora_linear(p.x[:15], packed, backend=backend)
    for i, y in enumerate(got):
        one = packed.linear(i)
        assert one.data.untyped_storage().data_ptr() == packed.data.untyped_storage().data_ptr()
        assert_same(lora_linear(p.x[:15], one, backend=backend), [y], backend)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_one_level_packed_every_other_reads(dtype: torch.dtype) -> None:
    p = problem(MEASURED, 33, (17, 5), (3,), dtype)
    for writer in LEVELS:
        with at_level(writer):
            packs = p.packs()
        for reader in LEVELS:
            with at_level(reader):
                assert_as_good_as_torch(lora_linear(p.x[:15], *packs, backend="cpu"), p, 15)


INDICES = {
    "sorted": [-1, 0, 0, 1, 2],
    "unsorted": [2, 0, -1, 1, 0],
    "all of one": [1, 1, 1, 1, 1],
    "none": [-1, -1, -1, -1, -1],
    "one sample": [2],
    "one sample, none": [-1],
    "no samples": [],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 77])
@pytest.mark.parametrize("name", INDICES)
def test_an_adapter_per_sample(backend: str, name: str, rows: int, dtype: torch.dtype) -> None:
    """Equal to one call per sample with that sample's adapter alone, or with none; the groups' ranks differ."""
    p, index = problem(5 * 77, 33, (17, 5), (3, 16, 4), dtype), INDICES[name]
    packed, adapters = p.packs()
    alone = [pack_adapters(packed, [group]) for group in p.groups]
    x = p.x[: len(index) * rows].view(len(index), rows, 33)
    got = lora_linear(x, packed, adapters, adapter_index=torch.tensor(index, dtype=torch.int64), backend=backend)
    assert [y.shape for y in got] == [(len(index), rows, n) for n in (17, 5)]
    for i, g in enumerate(index):
        want = lora_linear(x[i], packed, alone[g] if g >= 0 else None, backend=backend)
        assert_same([y[i] for y in got], want, backend)


def test_an_adapter_per_sample_in_any_shape(backend: str) -> None:
    p, index = problem(24, 33, (17, 5), (3, 16, 4), torch.float32), torch.tensor([2, -1, 0, 2])
    packed, adapters = p.packs()
    want = lora_linear(p.x.view(4, 6, 33), packed, adapters, adapter_index=index, backend=backend)
    swapped = p.x.view(4, 6, 33).transpose(0, 1).contiguous().transpose(0, 1)
    for x in (p.x.view(4, 2, 3, 33), swapped):
        got = lora_linear(x, packed, adapters, adapter_index=index, backend=backend)
        assert_same([y.reshape(4, 6, -1) for y in got], want, backend)
    single = lora_linear(p.x[:4], packed, adapters, adapter_index=index, backend=backend)
    assert_same(single, [y[:, 0] for y in lora_linear(p.x[:4, None], packed, adapters, adapter_index=index)], backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_group_with_an_index(backend: str, dtype: torch.dtype) -> None:
    p = problem(24, 33, (17, 5), (3,), dtype)
    packed, adapters = p.packs()
    both = lora_linear(p.x.view(2, 12, 33), packed, adapters, adapter_index=torch.tensor([0, -1]), backend=backend)
    assert_same([y[0] for y in both], lora_linear(p.x[:12], packed, adapters, backend=backend), backend)
    assert_same([y[1] for y in both], lora_linear(p.x[12:], packed, backend=backend), backend)


@pytest.mark.parametrize("index", [[0, 3], [-2, 0], [2**40, 0]], ids=str)
def test_an_index_out_of_range(backend: str, index: list[int]) -> None:
    p = problem(24, 33, (17, 5), (3, 16, 4), torch.float32)
    packed, adapters = p.packs()
    with pytest.raises(IndexError, match="adapter_index"):
        lora_linear(p.x.view(2, 12, 33), packed, adapters, adapter_index=torch.tensor(index), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LORA_LEVELS, indirect=True)
def test_same_bits_on_every_thread_count(level: str, dtype: torch.dtype) -> None:
    p, index = problem(308, 385, (96, 65, 33), (17, 4), dtype), torch.arange(4) % 3 - 1
    packed, adapters = p.packs()
    results = []
    for count in (1, 2, 3):
        with on_threads(count):
            results.append(lora_linear(p.x.view(4, 77, 385), packed, adapters, adapter_index=index, backend="cpu"))
    for other in results[1:]:
        assert all(torch.equal(y, same) for y, same in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_adapters_stacked_along_the_rank(backend: str, dtype: torch.dtype) -> None:
    """One group of both, a factor for each rank, adds what the two add."""
    p = problem(MEASURED, 385, (33, 17), (4, 17), dtype)
    stacked = tuple(_stack([group[i] for group in p.groups]) for i in range(2))
    both = Problem(p.x, p.weights, p.biases, (stacked,))
    assert_as_good_as_torch(lora_linear(p.x, *both.packs(), backend=backend), both, MEASURED)
    apart = [a + b - bare for a, b, bare in zip(*(exact(p, p.x, group) for group in (0, 1, -1)), strict=True)]
    for y, want in zip(exact(both, p.x), apart, strict=True):
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)


def _stack(parts: Sequence[LowRank | None]) -> LowRank:
    present = [one for one in parts if one is not None]
    return LowRank(
        torch.cat([one.down for one in present]),
        torch.cat([one.up for one in present], 1),
        torch.cat([one.scale.expand(len(one.down)) for one in present]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_in_place(backend: str, dtype: torch.dtype) -> None:
    p, other = (problem(MEASURED, 33, (17, 5), (3, 4), dtype, seed) for seed in (0, 1))
    index = torch.tensor([1, 0])
    packed, adapters = p.packs()
    addresses = [one.data_ptr() for one in (*adapters.down, *adapters.up, *adapters.scale)]
    adapters.update(packed, other.groups)
    assert [one.data_ptr() for one in (*adapters.down, *adapters.up, *adapters.scale)] == addresses
    x = p.x.view(2, -1, 33)
    got = lora_linear(x, packed, adapters, adapter_index=index, backend=backend)
    want = lora_linear(x, packed, pack_adapters(packed, other.groups), adapter_index=index, backend=backend)
    assert all(torch.equal(y, same) for y, same in zip(got, want, strict=True))


def test_an_update_that_does_not_fit_changes_nothing(backend: str) -> None:
    p, other = problem(24, 33, (17, 5), (3,), torch.float32), problem(24, 33, (17, 5), (4,), torch.float32)
    packed, adapters = p.packs()
    want = lora_linear(p.x, packed, adapters, backend=backend)
    with pytest.raises(ValueError, match=r"keeps the ranks \(\(3, 5\),\), got \(\(4, 6\),\)"):
        adapters.update(packed, other.groups)
    got = lora_linear(p.x, packed, adapters, backend=backend)
    assert all(torch.equal(y, same) for y, same in zip(got, want, strict=True))


@pytest.mark.parametrize("value", [1 + 0.4 * 2.0**-11, 1 + 2.0**-12, 1 + 3 * 2.0**-23], ids=str)
def test_long_sums_are_blocked(backend: str, value: float) -> None:
    """8192 equal terms: one running sum rounds in the same direction in every step of an octave.

    Chains of at most 512 terms, then of 16 partial sums, lose at most (512 + 16) half ulps of the sum. That is what the
    kernels do; how torch, and with it the reference, blocks its sums is not said anywhere.
    """
    k = 8192
    w = torch.full((33, k), value)
    want = float(w[0].double().sum())
    bound = 528 * 2.0**-24 * want
    if value == 1 + 0.4 * 2.0**-11:
        assert abs(float(w[0].numpy().cumsum(dtype=np.float32)[-1]) - want) > bound, "the bound must tell them apart"
    (got,) = lora_linear(torch.ones(15, k), pack_linear([w]), backend=backend)
    lost = abs(float((torch.ones(15, k) @ w.T).double().sub(want).abs().max()))
    error = float((got.double() - want).abs().max())
    assert error <= bound or backend == "reference"
    assert error <= 2 * lost + 2.0**-24 * want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_magnitudes(backend: str, dtype: torch.dtype) -> None:
    """Columns of x from 2^-10 to 2^10, weights the inverse, signs mixed.

    float32 sums of K + r + 3 terms lose at most half an ulp of sum |x||w| a term; each of the roundings that the dtype
    makes (y, t, its factor; the reference also rounds the base product and the added one) half its eps of the same sum.
    """
    p = problem(MEASURED, 33, (17, 5), (3,), dtype)
    ladder = torch.exp2(torch.linspace(-10, 10, 33).round()).to(dtype)
    group = [LowRank(one.down / ladder, one.up, one.scale) for one in p.groups[0] if one is not None]
    p = Problem(p.x * ladder, tuple(w / ladder for w in p.weights), p.biases, (group,))
    sizes = Problem(
        p.x.abs(),
        tuple(w.abs() for w in p.weights),
        tuple(None if b is None else b.abs() for b in p.biases),
        (tuple(LowRank(one.down.abs(), one.up.abs(), one.scale) for one in group),),
    )
    unit = (33 + 5 + 3) * 2.0**-24 + 5 * torch.finfo(dtype).eps / 2
    for y, want, size in zip(
        lora_linear(p.x, *p.packs(), backend=backend), exact(p, p.x), exact(sizes, sizes.x), strict=True
    ):
        assert ((y.double() - want).abs() <= unit * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subnormals(backend: str, dtype: torch.dtype) -> None:
    """Subnormal x, weights of order 1. The float32 kernels keep them; the instruction for bfloat16 takes 0 for one of
    its inputs and for its result, so a product may lose as much as the smallest normal number times the weight.
    """
    tiny = torch.finfo(dtype).smallest_normal
    x = (problem(MEASURED, 33, (17, 5), (3,), torch.float32).x * (tiny / 8)).to(dtype)
    p = problem(MEASURED, 33, (17, 5), (3,), dtype)
    bare = Problem(x, p.weights, (None, None), p.groups)
    for y, want, weight in zip(lora_linear(x, *bare.packs(), backend=backend), exact(bare, x), p.weights, strict=True):
        error = (y.double() - want).abs()
        if dtype == torch.float32:
            assert error.max() <= 64 * 2.0**-149, "each of some 40 roundings loses at most half the smallest number"
        else:
            assert (error <= 4 * tiny * (1 + weight.double().abs().sum(1))).all()
