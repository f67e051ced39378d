"""lora_linear beyond its values: gradients, what it refuses, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fastsample.ops.lora import lora_linear, lora_linear_reference
from fastsample.ops.lora.adapters import LowRank, PackedAdapters, pack_adapters
from fastsample.ops.lora.weights import PackedLinear, pack_linear
from support.levels import LEVELS, needs_cpu
from support.lora_formula import DTYPES, assert_as_good_as_torch, by_hand, problem
from support.lora_memory import Margins


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("index", [None, [1, -1, 0]], ids=["all", "per-sample"])
def test_gradients(index: list[int] | None) -> None:
    """In x, A and B, against differences; float64 has no kernel, what is differentiated is the same for every dtype."""
    p = problem(6, 5, (4, 3), (2, 3) if index else (2,), torch.float64)
    packed, chosen = p.packed(), None if index is None else torch.tensor(index)
    present = [one for group in p.groups for one in group if one is not None]

    def apply(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        pairs = iter(zip(factors[::2], factors[1::2], strict=True))
        groups = [[one and LowRank(*next(pairs), one.scale) for one in group] for group in p.groups]
        return lora_linear(x.view(3, 2, 5), packed, pack_adapters(packed, groups), adapter_index=chosen)

    operands = [p.x, *(factor for one in present for factor in (one.down, one.up))]
    assert torch.autograd.gradcheck(apply, [one.clone().requires_grad_() for one in operands])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_packed_linears(dtype: torch.dtype) -> None:
    """Those of the same call written in torch; here half the rounding of 16 bits, summed over 33 terms, is 33 eps."""
    p = problem(24, 33, (17, 5), (3,), dtype)
    x, theirs = (p.x.clone().requires_grad_() for _ in range(2))
    outputs = lora_linear(x, *p.packs())
    assert_as_good_as_torch([y.detach() for y in outputs], p, 24)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    torch.autograd.backward(by_hand(p, theirs), [torch.ones_like(y) for y in outputs])
    torch.testing.assert_close(x.grad, theirs.grad, rtol=0, atol=33 * torch.finfo(dtype).eps)


class Products(TorchDispatchMode):
    """How many terms the sums of every bfloat16 product have."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.overloadpacket.__name__:
            left, right = args[-2:]
            self.terms += [left.shape[-1]] if torch.bfloat16 in (left.dtype, right.dtype) else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("rows", "k", "n", "rank"),
    [(24, 32, 18, 4), (29, 32, 18, 4), (24, 33, 18, 4), (24, 32, 17, 4), (24, 32, 18, 3)],
    ids=["even", "rows", "k", "n", "rank"],
)
def test_no_sum_of_an_odd_number_of_bfloat16_products(rows: int, k: int, n: int, rank: int) -> None:
    """With AMX torch lets NaN from behind a row into those; gradients, of x and of both factors, have sums too."""
    p = problem(rows, k, (n,), (rank,), torch.bfloat16)
    (one,) = (one for one in p.groups[0] if one is not None)
    one = LowRank(*(factor.clone().requires_grad_() for factor in (one.down, one.up)), one.scale)
    x = p.x.clone().requires_grad_()
    with Products() as made:
        (y,) = lora_linear_reference(x, p.weights, p.biases[0], [[one]])
        y.sum().backward()
    assert not [terms for terms in made.terms if terms % 2]
    assert bool(made.terms) == (n % 2 == 0), "where nothing is odd torch's own products are the fastest"


@pytest.mark.parametrize("which", ["down", "up"])
def test_factors_alone_ask_for_gradients(which: str) -> None:
    p = problem(24, 33, (17,), (3,), torch.float32)
    (one,) = (one for one in p.groups[0] if one is not None)
    one = one._replace(**{which: getattr(one, which).clone().requires_grad_()})
    packed = p.packed()
    adapters = pack_adapters(packed, [[one]])
    (y,) = lora_linear(p.x, packed, adapters)
    y.sum().backward()
    assert getattr(one, which).grad.abs().max() > 0
    with torch.no_grad():
        assert not lora_linear(p.x, packed, adapters)[0].requires_grad


@needs_cpu
def test_the_kernels_have_no_gradients() -> None:
    p = problem(24, 33, (17,), (3,), torch.float32)
    with pytest.raises(ValueError, match=r"backend='cpu' .*without gradients"):
        lora_linear(p.x.clone().requires_grad_(), *p.packs(), backend="cpu")


def test_float64_runs_in_the_reference() -> None:
    p = problem(24, 33, (17,), (3,), torch.float64)
    assert_as_good_as_torch(lora_linear(p.x, *p.packs()), p, 24)
    with pytest.raises(ValueError, match="backend='cpu'"):
        lora_linear(p.x, *p.packs(), backend="cpu")


@needs_cpu
@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_beyond_the_outputs(level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    margins = Margins(monkeypatch)
    for ns in ((1,), (15, 33), (31, 5, 17)):
        p = problem(24, 33, ns, (3,), dtype)
        for rows in (1, 5, 14, 15):
            outputs = lora_linear(p.x[:rows], *p.packs(), backend="cpu")
            assert [y.data_ptr() for y in outputs] == margins.addresses
            margins.check(len(ns))


X, W = torch.ones(2, 3, 4), torch.ones(5, 4)
PACKED = pack_linear([W])
ONE = LowRank(torch.ones(2, 4), torch.ones(5, 2), torch.tensor(1.0))
GROUP, GROUPS = pack_adapters(PACKED, [[ONE]]), pack_adapters(PACKED, [[ONE], [ONE]])
INDEX = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(lambda: lora_linear([1.0], PACKED), TypeError, "x must be a tensor, got list", id="x-list"),
        pytest.param(
            lambda: lora_linear(torch.ones(()), PACKED), ValueError, r"4 features .*got shape \(\)", id="x-0d"
        ),
        pytest.param(lambda: lora_linear(torch.ones(4, 5), PACKED), ValueError, r"4 features .*\(4, 5\)", id="x-width"),
        pytest.param(
            lambda: lora_linear(X.bfloat16(), PACKED),
            TypeError,
            "x is torch.bfloat16, the weights are torch.float32",
            id="x-dtype",
        ),
        pytest.param(
            lambda: lora_linear(X.to("meta"), PACKED), ValueError, "x lies on meta, the weights on cpu", id="x-device"
        ),
        pytest.param(
            lambda: lora_linear(X, PACKED, GROUPS), ValueError, "2 groups of adapters: adapter_index", id="no-index"
        ),
        pytest.param(
            lambda: lora_linear(X, PACKED, adapter_index=INDEX),
            ValueError,
            "adapter_index needs adapters",
            id="no-adapters",
        ),
        pytest.param(
            lambda: lora_linear(X, PACKED, GROUPS, adapter_index=INDEX.int()),
            TypeError,
            "adapter_index must be int64, got torch.int32",
            id="index-dtype",
        ),
        pytest.param(
            lambda: lora_linear(X, PACKED, GROUPS, adapter_index=INDEX[:1]),
            ValueError,
            r"one index per sample of x, whose shape is \(2, 3, 4\); got shape \(1,\)",
            id="index-length",
        ),
        pytest.param(
            lambda: lora_linear(X, PACKED, GROUPS, adapter_index=INDEX[None]),
            ValueError,
            r"got shape \(1, 2\)",
            id="index-2d",
        ),
        pytest.param(
            lambda: lora_linear(X[0, 0], PACKED, GROUPS, adapter_index=INDEX[0]),
            ValueError,
            "one index per sample",
            id="x-1d",
        ),
        pytest.param(
            lambda: lora_linear(X, PACKED, GROUPS, adapter_index=INDEX.to("meta")),
            ValueError,
            "adapter_index lies on meta, x on cpu",
            id="index-device",
        ),
        pytest.param(
            lambda: lora_linear(X, PACKED, backend="abacus"), ValueError, "one of .*got 'abacus'", id="backend"
        ),
        pytest.param(lambda: pack_linear([]), ValueError, "weights holds no linear", id="no-weights"),
        pytest.param(lambda: pack_linear([W, [1.0]]), TypeError, r"weights\[1\] must be a dense", id="weight-list"),
        pytest.param(lambda: pack_linear([W.int()]), TypeError, r"weights\[0\] must be a dense", id="weight-int"),
        pytest.param(lambda: pack_linear([W[0]]), ValueError, r"\(out, in\), got \(4,\)", id="weight-1d"),
        pytest.param(lambda: pack_linear([W, W[:0]]), ValueError, r"weights\[1\] .*got \(0, 4\)", id="weight-empty"),
        pytest.param(
            lambda: pack_linear([W, torch.ones(5, 3)]), ValueError, r"share .*weights\[1\] .*\(5, 3\)", id="widths"
        ),
        pytest.param(lambda: pack_linear([W, W.half()]), ValueError, r"share .*weights\[1\] .*float16", id="dtypes"),
        pytest.param(lambda: pack_linear([W, W.to("meta")]), ValueError, r"share .*weights\[1\] .*meta", id="devices"),
        pytest.param(
            lambda: pack_linear([W], [None, None]), ValueError, "biases has 2 entries for 1 weights", id="biases"
        ),
        pytest.param(lambda: pack_linear([W], [torch.ones(4)]), ValueError, r"biases\[0\] .*\(4,\)", id="bias-shape"),
        pytest.param(
            lambda: pack_adapters(PACKED, [[ONE], [ONE, None]]),
            ValueError,
            r"groups\[1\] has 2 entries for 1 linears",
            id="group",
        ),
        pytest.param(
            lambda: pack_adapters(PACKED, [[ONE._replace(down=torch.ones(2, 3))]]),
            ValueError,
            r"groups\[0\]\[0\]: down \(2, 3\), up \(5, 2\) and scale \(\) do not fit a linear of 4 inputs and 5",
            id="down-shape",
        ),
        pytest.param(
            lambda: pack_adapters(PACKED, [[ONE._replace(up=torch.ones(5, 3))]]),
            ValueError,
            r"up \(5, 3\)",
            id="up-shape",
        ),
        pytest.param(
            lambda: pack_adapters(PACKED, [[ONE._replace(scale=torch.ones(3))]]),
            ValueError,
            r"scale \(3,\)",
            id="scale-shape",
        ),
    ],
)
def test_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


Call = Callable[[Tensor, "Tensor | None"], tuple[Tensor, ...]]


def layer(packed: PackedLinear, adapters: PackedAdapters | None) -> Call:
    def call(x: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(2 * y for y in lora_linear(x + 0, packed, adapters, adapter_index=index))

    return call


COMPILED = [
    pytest.param((None,), None, id="bare"),
    pytest.param((3,), None, id="one-group"),
    pytest.param((3, 4), [1, -1], id="per-sample"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(("ranks", "index"), COMPILED)
def test_compiled_without_a_graph_break(
    ranks: tuple[int | None, ...], index: list[int] | None, compiler: str, dtype: torch.dtype
) -> None:
    p = problem(24, 33, (17, 5), ranks, dtype)
    call, chosen = layer(*p.packs()), None if index is None else torch.tensor(index)
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for x in (p.x.view(2, 12, 33), p.x[:6].view(2, 3, 33)):  # the second compiles anew, with symbols for sizes
        with torch.no_grad():
            got, want = compiled(x, chosen), call(x, chosen)
        assert all(torch.equal(y, other) for y, other in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_factors_and_indices_do_not_recompile(dtype: torch.dtype) -> None:
    p, other = (problem(24, 33, (17, 5), (3, 4), dtype, seed) for seed in (0, 1))
    packed, adapters = p.packs()
    assert adapters is not None
    call, counter = layer(packed, adapters), CompileCounterWithBackend("eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    x = p.x.view(2, 12, 33)
    with torch.no_grad():
        before = compiled(x, torch.tensor([0, 1]))
        adapters.update(packed, other.groups)
        for index in ([0, 1], [-1, 0]):
            got, want = compiled(x, torch.tensor(index)), call(x, torch.tensor(index))
            assert all(torch.equal(y, same) for y, same in zip(got, want, strict=True))
            assert not torch.equal(got[0], before[0])
    assert counter.frame_count == 1


class Recorder(TorchDispatchMode):
    """Keeps the calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastsample":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@needs_cpu
@pytest.mark.parametrize(("ranks", "index"), COMPILED)
def test_operator(ranks: tuple[int | None, ...], index: list[int] | None) -> None:
    """Its schema, its fake kernel and its tracing, checked by torch on the arguments that a compiled call gives it."""
    p, recorder = problem(24, 33, (17, 5), ranks, torch.float32), Recorder()

    def run(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any) -> Any:
            with recorder:
                return graph(*arguments)

        return recorded

    chosen = None if index is None else torch.tensor(index)
    with torch.no_grad():
        torch.compile(layer(*p.packs()), fullgraph=True, backend=run)(p.x.view(2, 12, 33), chosen)
        ((func, args, kwargs),) = recorder.calls
        assert func is torch.ops.fastsample.lora_linear.default
        torch.library.opcheck(func, args, kwargs)
