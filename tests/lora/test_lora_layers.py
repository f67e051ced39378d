"""LoRALinear and QKVProjection against float64: sums, choices per sample, merging, gradients, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from fastsample.lora import LoRALinear, QKVProjection, set_adapter_index
from fastsample.lora.layers import frozen_linears
from support.lora_modules import KEEP, Pair, assert_close_to, layer_with, pair, qkv

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


@DTYPES
@KEEP
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_matches_float64(dtype: torch.dtype, keep_weight: bool, bias: bool) -> None:
    linear = nn.Linear(33, 17, bias=bias, dtype=dtype)
    weight = linear.weight.detach().clone()
    layer = LoRALinear.from_linear(linear, keep_weight=keep_weight)
    x = torch.randn(2, 5, 33, dtype=dtype)
    assert_close_to(layer(x), x, weight, linear.bias)
    one, two = pair(3, 33, 17, dtype), pair(6, 33, 17, dtype)
    layer.add_adapter("one", [one], scale=0.5, alpha=8)
    assert_close_to(layer(x), x, weight, linear.bias, (one, 0.5 * 8 / 3))
    layer.add_adapter("two", [two], scale=-2)
    assert_close_to(layer(x), x, weight, linear.bias, (one, 0.5 * 8 / 3), (two, -2.0))
    layer.set_adapters({"two": 0.25})
    assert_close_to(layer(x), x, weight, linear.bias, (two, -0.5))
    layer.set_adapters({})
    assert_close_to(layer(x), x, weight, linear.bias)
    layer.remove_adapter("two")
    assert layer.adapters == ("one",)


@KEEP
@DTYPES
def test_projection_matches_float64_as_one_and_singly(dtype: torch.dtype, keep_weight: bool) -> None:
    linears, projection = qkv(keep_weight=keep_weight)
    projection.to(dtype)
    weights = [projection.state_dict()[f"{i}.weight"].clone() for i in range(3)]
    first, second = pair(2, 7, 5, dtype), pair(4, 7, 6, dtype)
    projection.add_adapter("some", [first, None, second], scale=0.5)
    third = pair(3, 7, 3, dtype)
    projection.add_adapter("other", [None, third, None])
    x = torch.randn(4, 7, dtype=dtype)
    adapters: list[list[tuple[Pair, float]]] = [[(first, 0.5)], [(third, 1.0)], [(second, 0.5)]]
    for i, y in enumerate(projection(x)):
        assert_close_to(y, x, weights[i], linears[i].bias, *adapters[i])
        assert_close_to(projection.linear(i)(x), x, weights[i], linears[i].bias, *adapters[i])
    projection.set_adapters({"other": 2.0})
    for i in range(3):
        assert_close_to(projection.linear(i)(x), x, weights[i], linears[i].bias, *[(third, 2.0)] * (i == 1))


def test_a_linear_of_a_projection_has_its_memory_and_adapters() -> None:
    linears, projection = qkv()
    projection.linear(2).add_adapter("all", [None, None, pair(2, 7, 6)])
    assert projection.adapters == projection.linear(0).adapters == ("all",)
    assert projection.linear(1) is projection.linear(1)
    assert projection.linear(1).weight is linears[1].weight
    with pytest.raises(ValueError, match="3 entries"):
        projection.linear(0).add_adapter("own", [pair(2)])


@KEEP
def test_each_sample_gets_its_adapter(keep_weight: bool) -> None:
    _, projection = qkv(keep_weight=keep_weight)
    projection.add_adapter("a", [pair(2), pair(2, out=3), None])
    projection.add_adapter("b", [None, pair(5, out=3), pair(1, out=6)])
    projection.set_adapters({"b": 0.5, "a": 2.0})
    x, names = torch.randn(5, 4, 7), ["b", "a", None, "a", "b"]
    index = torch.tensor([-1 if name is None else ["b", "a"].index(name) for name in names])
    together = projection(x, index)
    singly = [projection.linear(i)(x, adapter_index=index) for i in range(3)]
    weights = {"b": 0.5, "a": 2.0}
    for sample, name in enumerate(names):
        projection.set_adapters({} if name is None else {name: weights[name]})
        for y, alone, own in zip(together, singly, projection(x[sample : sample + 1]), strict=True):
            # The same arithmetic over one sample or over five, in blocks of another size.
            torch.testing.assert_close(y[sample : sample + 1], own, rtol=0, atol=2e-5)
            torch.testing.assert_close(alone[sample : sample + 1], own, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_capacity_adds_only_zeros(dtype: torch.dtype) -> None:
    layer, x = layer_with(capacity=9), torch.randn(4, 7)
    factors = pair(2, dtype=dtype)
    layer.add_adapter("a", [factors])
    assert_close_to(layer(x), x, layer.weight.detach(), layer.bias, (factors, 1.0))


@KEEP
def test_merge_and_unmerge(keep_weight: bool) -> None:
    layer = layer_with(pair(2), pair(3), keep_weight=keep_weight)
    layer.set_adapters({"a0": 0.5, "a1": 2.0})
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(4, 7)
    want = layer(x)
    layer.merge()
    merged = layer.state_dict()["weight"]
    assert not torch.equal(merged, before["weight"])
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(functional.linear(x, merged, layer.bias), want, rtol=0, atol=1e-5)
    for refused in (layer.merge, lambda: layer.set_adapters({}), lambda: layer.remove_adapter("a0")):
        with pytest.raises(RuntimeError, match="unmerge"):
            refused()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer(x, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.load_state_dict(before)
    layer.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer(x), want)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


@KEEP
def test_gradients_reach_x_and_factors_and_not_the_weight(keep_weight: bool) -> None:
    _, projection = qkv(keep_weight=keep_weight)
    projection.double()
    down, up = (factor.double().requires_grad_() for factor in pair(2, out=6))
    other = tuple(factor.double() for factor in pair(3))
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        if "a" in projection.adapters:
            projection.remove_adapter("a")
        projection.add_adapter("a", [other, None, (down, up)], scale=0.5)
        return (*projection(x), projection.linear(2)(x), projection.linear(0)(x, torch.tensor([0, -1, 0])))

    assert torch.autograd.gradcheck(forward, (x, down, up))
    assert all(p.grad is None for p in projection.parameters())


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_returns_its_dtype(weight: torch.dtype, x: torch.dtype) -> None:
    layer = layer_with().to(weight)
    factors = pair(2, dtype=weight)
    layer.add_adapter("a", [factors])
    given = torch.randn(4, 7).to(x)
    for grad in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            assert nn.Linear(7, 5, dtype=weight)(given).dtype == torch.bfloat16
            got = layer(given.requires_grad_(grad))
        assert_close_to(got, given.detach().bfloat16(), layer.weight.detach(), layer.bias, (factors, 1.0))


def test_a_failure_while_packing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_with(pair(2)), torch.randn(4, 7)
    want = layer(x)

    def no_memory(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        original, calls = frozen_linears.pack_adapters, iter([no_memory])
        patch.setattr(frozen_linears, "pack_adapters", lambda *args: next(calls, original)(*args))
        layer.add_adapter("more", [pair(3)])
    assert layer.adapters == ("a0",)
    assert torch.equal(layer(x), want)


def bad(name: object = "new", pairs: object = None, **options: object) -> Callable[[LoRALinear], None]:
    return lambda layer: layer.add_adapter(name, [pair(2)] if pairs is None else pairs, **options)  # type: ignore[arg-type]


REFUSED = [
    pytest.param(bad("a0"), ValueError, "'a0' is one of a0", id="name-taken"),
    pytest.param(bad(3), TypeError, "name must be", id="name-int"),
    pytest.param(bad(pairs=[]), ValueError, "list of 1 entries", id="no-pairs"),
    pytest.param(bad(pairs=pair(2)), ValueError, "list of 1 entries", id="bare-pair"),
    pytest.param(bad(pairs=[None]), ValueError, "holds no", id="nothing"),
    pytest.param(bad(pairs=[(torch.ones(2, 7),)]), TypeError, "two floating-point", id="down-alone"),
    pytest.param(
        bad(pairs=[(torch.ones(2, 7).int(), torch.ones(5, 2).int())]), TypeError, "two floating-point", id="ints"
    ),
    pytest.param(bad(pairs=[pair(2, into=6)]), ValueError, r"A \(r, 7\) and B \(5, r\), got \(2, 6\)", id="in"),
    pytest.param(bad(pairs=[pair(2, out=4)]), ValueError, r"pairs\[0\].*\(4, 2\)", id="out"),
    pytest.param(bad(pairs=[(torch.ones(2, 7), torch.ones(5, 3))]), ValueError, r"\(5, 3\)", id="ranks"),
    pytest.param(bad(pairs=[pair(0)]), ValueError, r"pairs\[0\]", id="rank-0"),
    pytest.param(bad(pairs=[pair(5)]), ValueError, "rank 5, capacity is 4", id="capacity"),
    pytest.param(bad(scale=float("nan")), ValueError, "scale must be finite", id="scale-nan"),
    pytest.param(bad(alpha="8"), TypeError, "alpha must be a number", id="alpha-str"),
    pytest.param(lambda layer: layer.set_adapters({"a0": 1, "x": 1}), ValueError, "'x', there is 'a0'", id="unknown"),
    pytest.param(lambda layer: layer.set_adapters(["a0"]), TypeError, "weights must map", id="weights-list"),
    pytest.param(lambda layer: layer.set_adapters({"a0": float("inf")}), ValueError, "'a0' must be finite", id="inf"),
    pytest.param(lambda layer: layer.remove_adapter("x"), ValueError, "'x', there is 'a0'", id="remove"),
    pytest.param(lambda layer: layer(torch.ones(3, 6)), ValueError, "7 features", id="x-width"),
    pytest.param(lambda layer: layer(torch.ones(3, 7).double()), TypeError, "float64, the weights", id="x-dtype"),
    pytest.param(lambda layer: layer(torch.ones(3, 7), torch.tensor([0])), ValueError, "per sample", id="index"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refuses_before_anything_changes(call: Callable[[LoRALinear], Any], error: Any, message: str) -> None:
    layer, x = layer_with(pair(2), capacity=4), torch.randn(3, 7)
    want = layer(x)
    with pytest.raises(error, match=message):
        call(layer)
    assert layer.adapters == ("a0",)
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("active", [0, 1, 2])
@pytest.mark.parametrize("grad", [False, True], ids=["kernel", "reference"])
def test_every_index_is_checked(active: int, grad: bool) -> None:
    layer, x = layer_with(*[pair(2)] * active), torch.randn(2, 7, requires_grad=grad)
    layer(x, torch.tensor([-1, active - 1]))
    for index in (active, -2):
        with pytest.raises(IndexError, match=rf"adapter_index\[1\] is {index}: there are {active} groups"):
            layer(x, torch.tensor([-1, index]))
    with pytest.raises(ValueError, match="per sample"):
        layer(x, torch.tensor([-1]))


def test_the_order_that_an_index_counts_stays() -> None:
    net = nn.Sequential(layer_with(pair(2), pair(3)))
    set_adapter_index(net, torch.tensor([1, 0]))
    for refused in (lambda: net[0].set_adapters({"a1": 1.0}), lambda: net[0].remove_adapter("a0")):
        with pytest.raises(ValueError, match=r"counts the active adapters a0, a1, which would become a1"):
            refused()
    net[0].set_adapters({"a0": 2.0, "a1": 1.0})


def test_swap_adapter() -> None:
    linears, projection = qkv(capacity=3)
    x, one, two = torch.randn(4, 7), pair(2), pair(3)
    projection.add_adapter("a", [one, None, pair(2, out=6)])
    packed = projection._frozen._forms[None, False][1].down[0].data_ptr()
    projection.swap_adapter("a", [two, None, None], scale=0.5, alpha=6)
    assert projection._frozen._forms[None, False][1].down[0].data_ptr() == packed
    outputs = projection(x)
    assert_close_to(outputs[0], x, linears[0].weight.detach(), linears[0].bias, (two, 1.0))
    assert_close_to(outputs[2], x, linears[2].weight.detach(), linears[2].bias)
    for name, pairs, message in (
        ("b", [one, None, None], "'b', there is 'a'"),
        ("a", [None, pair(1, out=3), None], r"pairs\[1\]: adapter 'a' has no factors"),
        ("a", [pair(4), None, None], "rank 4, capacity is 3"),
    ):
        with pytest.raises(ValueError, match=message):
            projection.swap_adapter(name, pairs)
    assert all(torch.equal(y, z) for y, z in zip(projection(x), outputs, strict=True))


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def wrapped() -> nn.Module:
    linear = nn.Linear(7, 5)
    linear.forward = lambda x: x
    return linear


def released() -> nn.Module:
    linear = nn.Linear(7, 5)
    LoRALinear.from_linear(linear, keep_weight=False)
    return linear


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(3, 3, 1),
        lambda: Doubling(7, 5),
        lambda: nn.MultiheadAttention(4, 1).out_proj,
        lambda: parametrizations.weight_norm(nn.Linear(7, 5)),
        lambda: nn.Linear(7, 5, device="meta"),
        wrapped,
        lambda: layer_with(),
        lambda: None,
        lambda: released(),
    ],
    ids=["conv", "subclass", "multihead", "parametrized", "meta", "wrapped", "adapted", "none", "released"],
)
def test_takes_plain_linears_only(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"plain Linear .*got \w+\.\S+: (it|its|MultiheadAttention) \w+"):
        LoRALinear.from_linear(make())
    with pytest.raises(TypeError, match="plain Linear"):
        QKVProjection.from_linears([nn.Linear(7, 5), make()], keep_weight=False)


@pytest.mark.parametrize("capacity", [0, -1, 2.0, True])
def test_refuses_capacities(capacity: Any) -> None:
    with pytest.raises(ValueError, match="capacity"):
        LoRALinear.from_linear(nn.Linear(7, 5), capacity=capacity)
