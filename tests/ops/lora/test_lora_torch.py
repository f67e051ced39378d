"""lora_linear among torch's own ways to look at an op, and packs that do not fit: nothing is read or written astray."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastsample.ops import LowRank, PackedAdapters, lora_linear, pack_adapters, pack_linear
from fastsample.ops.backend import cpu_module
from support.levels import needs_cpu, on_threads

_cpu = cpu_module()

X, W = torch.randn(3, 8), torch.randn(5, 8)


def low_rank(rank: int = 2, inputs: int = 8, outputs: int = 5, scale: float = 0.5) -> LowRank:
    return LowRank(torch.randn(rank, inputs), torch.randn(outputs, rank), torch.tensor(scale))


def by_hand(x: Tensor, one: LowRank) -> Tensor:
    return functional.linear(x, W) + functional.linear(functional.linear(x, one.down) * one.scale, one.up)


def close(a: Tensor, b: Tensor) -> None:
    # 16 additions of values of order 10 in float32.
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


PACKED = pack_linear([W])
ONE = low_rank()
ADAPTERS = pack_adapters(PACKED, [[ONE]])


def call(x: Tensor) -> Tensor:
    return lora_linear(x, PACKED, ADAPTERS)[0]


@pytest.mark.parametrize(
    "transformed",
    [
        pytest.param(lambda x: torch.func.vmap(call)(x[:, None])[:, 0], id="vmap"),
        pytest.param(lambda x: torch.jit.trace(call, (torch.zeros_like(x),))(x), id="jit.trace"),
        pytest.param(lambda x: make_fx(call)(torch.zeros_like(x))(x), id="make_fx"),
        pytest.param(lambda x: call(torch._neg_view(-x)), id="negative-bit"),
        pytest.param(lambda x: torch.compile(call, fullgraph=True, backend="aot_eager")(x), id="compile"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and says so in many places
def test_transformed_calls_give_the_result(transformed) -> None:
    close(transformed(X), by_hand(X, ONE))


def test_fake_tensors_get_shapes() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert call(torch.empty(4, 7, 8)).shape == (4, 7, 5)


def test_functional_derivatives() -> None:
    jacobian = W + ONE.scale * ONE.up @ ONE.down
    close(torch.func.jacrev(call)(X[0]), jacobian)
    close(torch.func.jacfwd(call)(X[0]), jacobian)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        tangent = torch.autograd.forward_ad.unpack_dual(call(dual)).tangent
    close(tangent, torch.ones_like(X) @ jacobian.T)


def test_a_differentiable_call_compiles() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = X.clone().requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None
    close(x.grad, (W + ONE.scale * ONE.up @ ONE.down).sum(0).expand(3, 8))


def test_the_scale_has_gradients() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    one = low_rank()._replace(scale=scale)
    lora_linear(X, PACKED, pack_adapters(PACKED, [[one]]))[0].sum().backward()
    assert scale.grad is not None
    close(scale.grad, (X @ one.down.T @ one.up.T).sum())


@pytest.mark.parametrize("rank", [0, 1])
def test_adapters_of_rank_0_add_nothing(rank: int) -> None:
    adapters = pack_adapters(PACKED, [[low_rank(0)], [low_rank(rank)], [None]])
    bare = lora_linear(X, PACKED)[0]
    ys = lora_linear(X, PACKED, adapters, adapter_index=torch.tensor([0, 1, 2]))[0]
    assert torch.equal(ys[0], bare[0]) and torch.equal(ys[2], bare[2])
    assert torch.equal(ys[1], bare[1]) == (rank == 0)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([torch.randn(5, 4000)], id="inputs"),
        pytest.param([torch.randn(6, 8)], id="outputs"),
        pytest.param([W, W, W], id="linears"),
        pytest.param([W.bfloat16()], id="dtype"),
        pytest.param([W.double()], id="layout"),
    ],
)
def test_adapters_of_other_linears_are_refused(other: list[Tensor]) -> None:
    packed = pack_linear(other)
    with pytest.raises(ValueError, match="packed for other linears"):
        lora_linear(torch.ones(3, other[0].shape[1], dtype=other[0].dtype), packed, ADAPTERS)
    with pytest.raises(ValueError, match="the linears that the adapters were packed for"):
        pack_adapters(PACKED, [[ONE]]).update(packed, [[ONE] * len(other)])


@pytest.mark.parametrize(
    ("one", "error", "message"),
    [
        pytest.param(low_rank(3), ValueError, "keeps the ranks", id="rank"),
        pytest.param(low_rank(2, inputs=9), ValueError, "do not fit", id="down"),
        pytest.param(low_rank(2, outputs=4000), ValueError, "do not fit", id="up"),
        pytest.param(ONE._replace(scale=torch.ones(3)), ValueError, "do not fit", id="scale"),
        pytest.param(ONE._replace(scale=0.5), TypeError, "dense floating-point", id="number"),
        pytest.param(ONE._replace(down=torch.tensor(1.0)), ValueError, "do not fit", id="0-d"),
        pytest.param(ONE._replace(up=ONE.up.to("meta")), ValueError, "meta device", id="meta"),
        pytest.param(ONE._replace(up=ONE.up.to_sparse()), TypeError, "dense floating-point", id="sparse"),
    ],
)
def test_an_update_that_fails_changes_nothing(one: LowRank, error: type[Exception], message: str) -> None:
    adapters = pack_adapters(PACKED, [[ONE]])
    before = lora_linear(X, PACKED, adapters)[0]
    with pytest.raises(error, match=message):
        adapters.update(PACKED, [[one]])
    assert adapters.groups[0][0] is ONE
    assert torch.equal(lora_linear(X, PACKED, adapters)[0], before)


@needs_cpu
def test_a_factor_written_after_packing_raises() -> None:
    one = low_rank()
    adapters = pack_adapters(PACKED, [[one]])
    one.up.add_(1)
    with pytest.raises(RuntimeError, match=r"written after it was packed: call adapters.update\(\)"):
        lora_linear(X, PACKED, adapters)
    adapters.update(PACKED, [[one]])
    close(lora_linear(X, PACKED, adapters)[0], by_hand(X, one))


def saved(value: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda value: torch.load(saved(value), weights_only=False), id="pickle"),
    ],
)
def test_packs_can_be_copied(copied) -> None:
    packed, adapters = copied((PACKED, ADAPTERS))
    assert isinstance(adapters, PackedAdapters) and packed.data.data_ptr() != PACKED.data.data_ptr()
    assert torch.equal(lora_linear(X, packed, adapters)[0], call(X))
    assert torch.equal(packed.unpack()[0], W)


def test_a_pack_loaded_elsewhere_has_shapes_alone() -> None:
    packed = torch.load(saved(PACKED), weights_only=False, map_location="meta")
    assert packed.unpack()[0].is_meta
    assert lora_linear(X.to("meta"), packed)[0].shape == (3, 5)


@needs_cpu
@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_without_memory_leaves_the_next_one_whole(threads: int) -> None:
    wide = pack_linear([torch.ones(1, 1)])
    with on_threads(threads):
        # One row so long that no memory holds it packed; nothing of it is read.
        with pytest.raises(MemoryError):
            _cpu.lora_linear(
                *(X.data_ptr(), 1, 1, 0, wide.layout, 6, 1 << 45, wide.data.data_ptr(), (1,), 0),
                *([], [], [], (), 0, [0], threads),
            )
        close(call(X), by_hand(X, ONE))
