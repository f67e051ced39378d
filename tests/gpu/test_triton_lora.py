"""lora_linear's Triton kernels, interpreted where there is no GPU, in both of their forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsample
from fastsample.lora import LoRALinear, QKVProjection
from fastsample.ops import backend as backends
from fastsample.ops.lora import lora_linear, lora_linear_reference
from fastsample.ops.lora.adapters import LowRank, PackedAdapters, pack_adapters
from fastsample.ops.lora.weights import PackedLinear, pack_linear
from support.devices import DEVICE, HAS_GPU
from support.lora_formula import (
    DTYPES,
    MEASURED,
    Problem,
    assert_as_good_as_torch,
    assert_same,
    exact,
    problem,
)
from support.lora_memory import LAYOUTS, Margins, layouts

TRITON = fastsample.backends()["triton"]
pytestmark = [
    pytest.mark.skipif(not TRITON["available"], reason=TRITON["reason"]),
    pytest.mark.usefixtures("nan_filled_new_empty"),
]

NAN = math.nan
HALVES_AND_FLOAT = [torch.float32, torch.float16]


@pytest.fixture(params=["one launch", "two launches"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether expand sums t itself, whatever the rule says; above its largest rank it cannot."""
    from fastsample.kernels.lora import tiles

    alone = request.param == "one launch"
    monkeypatch.setattr(tiles, "one_launch", lambda one: alone and one.width <= 64)
    return request.param


def packs(p: Problem) -> tuple[PackedLinear, PackedAdapters | None]:
    """By rows, on the device that the kernels run on."""
    packed = pack_linear([w.to(DEVICE) for w in p.weights], [None if b is None else b.to(DEVICE) for b in p.biases])
    packed = packed.by_rows()
    return packed, pack_adapters(packed, p.groups) if p.groups else None


def run(x: Tensor, *packed: Any, index: list[int] | None = None) -> list[Tensor]:
    chosen = None if index is None else torch.tensor(index, dtype=torch.int64, device=DEVICE)
    outputs = lora_linear(x.to(DEVICE), *packed, adapter_index=chosen, backend="triton")
    return [y.cpu() for y in outputs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "k", "ns", "rank"),
    [
        pytest.param(1, 5, (5,), 1, id="1x5-r1"),
        pytest.param(3, 16, (5, 33), 4, id="3x16-r4"),
        pytest.param(17, 40, (33, 5, 64), 16, id="17x40-r16"),
        pytest.param(77, 40, (64,), 20, id="77x40-r20"),
        pytest.param(3, 320, (33, 5), 64, id="3x320-r64"),
        pytest.param(17, 16, (64, 33), 130, id="17x16-r130"),
        pytest.param(17, 40, (33, 64), None, id="17x40-bare"),
    ],
)
def test_error_against_float64(
    form: str, dtype: torch.dtype, rows: int, k: int, ns: tuple[int, ...], rank: int | None
) -> None:
    """Also in bfloat16, which the interpreter stores truncated: the error of its one rounding then has eps for eps/2,
    which is what the bound allows over torch's own.
    """
    p = problem(MEASURED, k, ns, (rank,), dtype)
    assert_as_good_as_torch(run(p.x[:rows], *packs(p)), p, rows)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_an_adapter_per_sample(form: str, dtype: torch.dtype) -> None:
    """Equal to one call per sample with that sample's adapter alone, or with none; the groups' ranks differ."""
    p, index = problem(5 * 7, 33, (17, 40), (3, 16, 20), dtype), [2, 0, -1, 1, 0]
    packed, adapters = packs(p)
    x = p.x.view(5, 7, 33)
    got = run(x, packed, adapters, index=index)
    for i, g in enumerate(index):
        alone = pack_adapters(packed, [p.groups[g]]) if g >= 0 else None
        assert_same([y[i] for y in got], run(x[i], packed, alone), "triton")
        assert_as_good_as_torch([y[i] for y in got], Problem(p.x[7 * i :], *_rest(p)), 7, g)


def _rest(p: Problem) -> tuple[Any, Any, Any]:
    return p.weights, p.biases, p.groups


def test_samples_of_several_tiles(form: str) -> None:
    p = problem(2 * 45, 33, (40,), (3, 4), torch.float32)
    got = run(p.x.view(2, 45, 33), *packs(p), index=[1, 0])
    for i, g in enumerate([1, 0]):
        assert_as_good_as_torch([y[i] for y in got], Problem(p.x[45 * i :], *_rest(p)), 45, g)


def test_an_index_out_of_range_gives_nan_in_its_sample(form: str) -> None:
    p = problem(5 * 3, 33, (17, 5), (3, 4), torch.float32)
    got = run(p.x.view(5, 3, 33), *packs(p), index=[0, 2, -2, 2**40, 1])
    want = run(p.x.view(5, 3, 33), *packs(p), index=[0, 0, 0, 0, 1])
    for y, other in zip(got, want, strict=True):
        assert y[1:4].isnan().all()
        assert torch.equal(y[[0, 4]], other[[0, 4]])


def test_the_reference_does_the_same_where_it_does_not_look(fresh_compiler: None) -> None:
    p = problem(3 * 3, 33, (17,), (3, 4), torch.float16)
    compiled = torch.compile(lora_linear_reference, fullgraph=True, backend="eager")
    (y,) = compiled(p.x.view(3, 3, 33), p.weights, None, p.groups, torch.tensor([0, 2, -1]))
    assert y.dtype == torch.float16 and y[1].isnan().all() and not y[[0, 2]].isnan().any()


def test_rank_0_adds_nothing(form: str) -> None:
    p = problem(7, 33, (17, 5), (None,), torch.float32)
    packed, _ = packs(p)
    none = LowRank(torch.ones(0, 33), torch.ones(17, 0), torch.tensor(1.0))
    one = LowRank(torch.ones(1, 33), torch.ones(5, 1), torch.tensor(1.0))
    bare = run(p.x, packed)
    for group in ([none, None], [None, None]):
        assert all(
            torch.equal(y, z) for y, z in zip(run(p.x, packed, pack_adapters(packed, [group])), bare, strict=True)
        )
    first, second = run(p.x, packed, pack_adapters(packed, [[none, one]]))
    assert torch.equal(first, bare[0])
    torch.testing.assert_close(second, bare[1] + p.x.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_both_forms_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They sum the same products, t's too, in blocks of the same features one after the other."""
    from fastsample.kernels.lora import tiles

    p, results = problem(2 * 17, 72, (33, 17), (20, 5), dtype), []
    for alone in (True, False):
        monkeypatch.setattr(tiles, "one_launch", lambda one, alone=alone: alone)
        results.append(run(p.x.view(2, 17, 72), *packs(p), index=[1, 0]))
    assert_same(*results, "triton")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_x(name: str) -> None:
    p = problem(24, 33, (17, 5), (3,), torch.float32)
    x = layouts(p.x.to(DEVICE))[name]
    got = run(x, *packs(p))
    want = run(x.resolve_neg().reshape(-1, 33).contiguous(), *packs(p))
    assert [y.shape for y in got] == [(*x.shape[:-1], n) for n in (17, 5)]
    assert all(torch.equal(y.reshape(-1, y.shape[-1]), other) for y, other in zip(got, want, strict=True))


def test_infinite_x_meets_no_padding(form: str) -> None:
    """All factors are positive, so that y is infinite; a padded rank would make it 0 * inf."""
    one = LowRank(torch.ones(3, 33), torch.ones(17, 3), torch.tensor(0.5))
    packed = pack_linear([torch.ones(17, 33, device=DEVICE)]).by_rows()
    x = torch.ones(4, 33)
    x[2, 5] = math.inf
    (y,) = run(x, packed, pack_adapters(packed, [[one]]))
    assert (y[2] == math.inf).all()
    assert (y[[0, 1, 3]] == 33 + 3 * 0.5 * 33).all()


def test_nan_stays_in_its_row(form: str) -> None:
    p = problem(MEASURED, 33, (17, 5), (3,), torch.float32)
    x = p.x[:29].clone()
    x[14, 5] = NAN
    others = torch.arange(29) != 14
    for y, clean in zip(run(x, *packs(p)), exact(p, p.x[:29]), strict=True):
        assert y[14].isnan().all()
        torch.testing.assert_close(y[others].double(), clean[others], rtol=1e-5, atol=1e-5)


def test_nothing_is_written_beyond_the_outputs(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    margins = Margins(monkeypatch)
    p = problem(24, 33, (31, 5, 17), (3,), torch.float32)
    for rows in (1, 24):
        assert not any(y.isnan().any() for y in run(p.x[:rows], *packs(p)))
        margins.check(3)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_update_in_place(form: str, dtype: torch.dtype) -> None:
    """Other factors and scales of the same ranks, at the same addresses."""
    p, other = (problem(12, 33, (17, 5), (3, 20), dtype, seed) for seed in (0, 1))
    packed, adapters = packs(p)
    assert adapters is not None
    x = p.x.view(2, 6, 33)
    before = run(x, packed, adapters, index=[1, 0])
    addresses = [one.data_ptr() for one in (*adapters.down, *adapters.up, *adapters.scale)]
    louder = [[one and one._replace(scale=2 * one.scale) for one in group] for group in other.groups]
    for groups in (other.groups, louder):
        adapters.update(packed, groups)
        got = run(x, packed, adapters, index=[1, 0])
        want = run(x, packed, pack_adapters(packed, groups), index=[1, 0])
        assert all(torch.equal(y, z) and not torch.equal(y, old) for y, z, old in zip(got, want, before, strict=True))
        before = got
    assert [one.data_ptr() for one in (*adapters.down, *adapters.up, *adapters.scale)] == addresses


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_have_the_bits_that_were_packed(dtype: torch.dtype) -> None:
    p = problem(4, 33, (17, 5), (None,), dtype)
    packed = p.packed()
    rows = packed.by_rows()
    assert rows.data.shape == (22 * 33,) and rows.by_rows() is rows
    for weight, unpacked, second in zip(p.weights, rows.unpack(), (rows.linear(0), rows.linear(1)), strict=True):
        assert torch.equal(unpacked, weight) and torch.equal(second.unpack()[0], weight)


@pytest.mark.skipif(HAS_GPU, reason="CPU tensors are the interpreter's")
def test_packs_of_the_cpu_kernels_are_taken_too() -> None:
    p = problem(12, 33, (17, 5), (3, 4), torch.float32)
    packed, adapters = p.packs()
    index = torch.tensor([1, -1])
    got, want = (
        lora_linear(p.x.view(2, 6, 33), packed, adapters, adapter_index=index, backend=one) for one in ("triton", None)
    )
    assert_same(got, want, "triton")


def test_no_gradients_and_no_float64() -> None:
    p = problem(4, 33, (17,), (3,), torch.float32)
    with pytest.raises(ValueError, match=r"backend='triton' .*without gradients"):
        lora_linear(p.x.to(DEVICE).requires_grad_(), *packs(p), backend="triton")
    with pytest.raises(ValueError, match=r"backend='triton' has no kernel for weights of this dtype"):
        run(p.x.detach().double(), pack_linear([p.weights[0].double().to(DEVICE)]))


def operands(*ranks: int) -> tuple[Any, ...]:
    p = problem(12, 33, (17, 5), ranks, torch.float32)
    packed, adapters = packs(p)
    factors = (
        ([], [], [], []) if adapters is None else (adapters.down, adapters.up, adapters.scale, adapters.flat_ranks)
    )
    index = torch.tensor([1, -1], device=DEVICE) if len(ranks) > 1 else None
    return p.x.view(2, 6, 33).to(DEVICE), packed.data, packed.bias, packed.out_features, *factors, index, packed.layout


@pytest.mark.parametrize("ranks", [(), (3,), (3, 4)], ids=["bare", "one-group", "per-sample"])
def test_the_registered_op(ranks: tuple[int, ...]) -> None:
    """Its schema, its fake kernel and its tracing."""
    torch.library.opcheck(torch.ops.fastsample.lora_linear.default, operands(*ranks))


def test_compiled_without_a_graph_break(fresh_compiler: None) -> None:
    p = problem(12, 33, (17, 5), (3, 4), torch.float32)
    packed, adapters = packs(p)
    index = torch.tensor([1, -1], device=DEVICE)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        outputs = lora_linear(x + 0, packed, adapters, adapter_index=index, backend="triton")
        return tuple(2 * y for y in outputs)

    x = p.x.view(2, 6, 33).to(DEVICE)
    with torch.no_grad():
        got, want = torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x)
    assert all(torch.equal(y, other) for y, other in zip(got, want, strict=True))


def test_layers_run_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v, and one linear, with adapters added, weighted, per sample and swapped: as with torch's own."""
    torch.manual_seed(0)
    linears = [nn.Linear(16, n, device=DEVICE) for n in (16, 16, 8)]
    qkv = QKVProjection.from_linears(linears, capacity=4)
    out = LoRALinear.from_linear(nn.Linear(16, 5, device=DEVICE), keep_weight=False)

    def pair(n: int, r: int) -> tuple[Tensor, Tensor]:
        return torch.randn(r, 16, device=DEVICE), torch.randn(n, r, device=DEVICE)

    qkv.add_adapter("a", [pair(16, 4), None, pair(8, 3)], scale=0.5)
    qkv.add_adapter("b", [pair(16, 2), pair(16, 1), None])
    out.add_adapter("a", [pair(5, 3)])
    x, index = torch.randn(3, 4, 16, device=DEVICE), torch.tensor([1, -1, 0], device=DEVICE)

    def everything() -> list[Tensor]:
        with torch.no_grad():
            return [*qkv(x), *qkv(x, index), *qkv.linear(2)(x, index)[None], out(x)]

    def compared() -> None:
        results = []
        for name in ("triton", "reference"):
            monkeypatch.setattr(backends, "_override", name)
            results.append(everything())
        # Two ways to sum some 20 products of order 10 in float32.
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)

    compared()
    qkv.set_adapters({"a": 0.3, "b": -2.0})
    qkv.swap_adapter("a", [pair(16, 1), None, pair(8, 4)])
    compared()
