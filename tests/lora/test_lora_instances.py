"""An attached layer is what it replaces: of its class, with its attributes, which stay after detach."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample import lora
from fastsample.lora.layers.adapted import AdaptedLayer
from support.lora_modules import KEEP, Unchanged, assert_close_to, pair

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

Pair = tuple[Tensor, Tensor]


class Named(nn.Linear):
    """A user's linear: its forward is nn.Linear's, all else is its own."""

    kind = "named"

    def __init__(self, into: int, out: int, label: str) -> None:
        super().__init__(into, out)
        self.label = label
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().__call__(x)

    @property
    def size(self) -> int:
        return self.weight.numel()


class Copied(nn.Linear):
    """Copies itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        twin = Copied(self.in_features, self.out_features)
        twin.load_state_dict(self.state_dict())
        return twin


class Tiled(nn.Conv2d):
    def tiles(self) -> int:
        return self.out_channels // 2


class Final(nn.Linear):
    def __init_subclass__(cls, **_: Any) -> None:
        raise TypeError("Final is final")


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "own-linear": (lambda: Named(7, 5, "q"), (3, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 5)),
    "own-conv2d": (lambda: Tiled(3, 4, 3), (2, 3, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 3, 5)),
}
EACH = pytest.mark.parametrize("name", MODULES)


def factors(module: Any, rank: int = 2) -> Pair:
    out, into, *kernel = module.weight.shape
    return torch.randn(rank, into, *kernel), torch.randn(out, rank, *(1 for _ in kernel))


def attached(name: str, **options: Any) -> tuple[nn.Sequential, Any, Tensor, Pair]:
    """A model of one layer with an adapter, the module that the layer replaced, an input, and A and B."""
    make, shape = MODULES[name]
    module = make().requires_grad_(False)
    net, (down, up) = nn.Sequential(module), factors(module)
    lora.attach(net, {"0.lora_A.weight": down, "0.lora_B.weight": up}, **options)
    return net, module, torch.randn(shape), (down, up)


def twice_pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@EACH
def test_isinstance_holds(name: str) -> None:
    net, module, _, _ = attached(name)
    layer = net[0]
    assert isinstance(layer, AdaptedLayer)
    assert layer is not module
    assert isinstance(layer, type(module))
    assert layer.__dict__ is module.__dict__
    lora.detach(net)
    assert net[0] is module


def test_a_subclass_keeps_what_is_its_own() -> None:
    net, module, x, _ = attached("own-linear")
    assert (net[0].kind, net[0].label, net[0].size) == ("named", "q", 35)
    net(x)
    assert net[0].calls == module.calls == 1
    conv, _, _, _ = attached("own-conv2d")
    assert conv[0].tiles() == 2
    assert type(conv[0]) is type(attached("own-conv2d")[0][0])


@EACH
@pytest.mark.parametrize("how", [copy.deepcopy, twice_pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
def test_copies_are_instances_with_attributes_of_their_own(name: str, how: Callable[[nn.Module], Any]) -> None:
    net, module, x, _ = attached(name)
    net[0].foo = [1]
    twin = how(net)
    assert type(twin[0]) is type(net[0])
    assert torch.equal(twin(x), net(x))
    twin[0].foo.append(2)
    twin[0].bar = "twin"
    assert (module.foo, hasattr(module, "bar")) == ([1], False)
    lora.detach(twin)
    assert type(twin[0]) is type(module)
    assert (twin[0].foo, twin[0].bar) == ([1, 2], "twin")
    assert torch.equal(twin[0].weight, module.weight)


def test_a_class_that_copies_itself_copies_no_layer_without_its_adapters() -> None:
    net, x = nn.Sequential(Copied(7, 5)).requires_grad_(False), torch.randn(3, 7)
    down, up = factors(net[0])
    lora.attach(net, {"0.lora_A.weight": down, "0.lora_B.weight": up})
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    lora.detach(twin)
    assert type(twin[0]) is Copied
    assert not torch.equal(twin(x), net(x))


def test_a_copy_of_the_replaced_module_is_one_without_adapters() -> None:
    net, module, x, _ = attached("linear")
    twin = copy.deepcopy(module)
    assert type(twin) is nn.Linear
    lora.detach(net)
    assert torch.equal(twin(x), net(x))


@KEEP
@EACH
def test_attributes_are_seen_on_both_sides_and_stay(name: str, keep_weight: bool) -> None:
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape)
    module.before, module.gone = "seen", 1
    net, (down, up) = nn.Sequential(module), factors(module)
    want = module(x)
    lora.attach(net, {"0.lora_A.weight": down, "0.lora_B.weight": up}, keep_weight=keep_weight)
    layer = net[0]
    assert layer.before == "seen"
    layer.foo = 1
    layer.child = nn.ReLU()
    layer.register_buffer("count", torch.tensor(3))
    layer.register_forward_hook(lambda *_: None)
    layer.weight.requires_grad_(False)
    layer.eval()
    del layer.gone
    module.late = "from the module"
    assert layer.late == "from the module"
    lora.detach(net)
    assert net[0] is module
    assert (module.foo, type(module.child), int(module.count)) == (1, nn.ReLU, 3)
    assert (len(module._forward_hooks), module.weight.requires_grad, module.training) == (1, False, False)
    assert not hasattr(module, "gone")
    assert not any("frozen" in key or "replaced" in key for key in vars(module))
    assert torch.equal(module(x), want)


@KEEP
@pytest.mark.parametrize("bias", ["new", "none", "kept"])
@pytest.mark.parametrize("name", ["linear", "own-linear"])
def test_a_weight_and_a_bias_that_are_set_count(name: str, bias: str, keep_weight: bool) -> None:
    net, module, x, adapter = attached(name, keep_weight=keep_weight)
    layer, weight = net[0], torch.randn(5, 7)
    layer.weight = nn.Parameter(weight.clone())
    if bias != "kept":
        layer.bias = nn.Parameter(torch.randn(5)) if bias == "new" else None
    kept = None if layer.bias is None else layer.bias.detach().clone()
    assert_close_to(net(x).detach(), x, weight, kept, (adapter, 1.0))
    lora.detach(net)
    assert torch.equal(module.weight, weight)
    assert_close_to(net(x).detach(), x, weight, kept)


def test_a_weight_and_a_stride_of_a_convolution_that_are_set_count() -> None:
    net, module, x, _ = attached("conv2d")
    before = net(x)
    net[0].weight = nn.Parameter(module.weight * 0)
    net[0].bias = nn.Parameter(torch.zeros(4))
    alone = net(x)
    assert not torch.allclose(alone, before)
    net[0].stride = (2, 1)
    torch.testing.assert_close(net(x), alone[:, :, ::2], rtol=0, atol=1e-5)
    lora.detach(net)
    assert not net(x).any()
    assert module.stride == (2, 1)


BAD = {
    "shape": (lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(5, 6))), ValueError, r"weight .*\(5, 7\)"),
    "bias": (lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(4))), ValueError, r"bias .*\(5,\)"),
    "none": (lambda layer: setattr(layer, "weight", None), ValueError, "weight must be a Parameter"),
    "tensor": (lambda layer: setattr(layer, "weight", torch.ones(5, 7)), TypeError, "weight"),
}


@KEEP
@pytest.mark.parametrize("name", BAD)
def test_other_weights_are_refused_and_nothing_changes(name: str, keep_weight: bool) -> None:
    net, module, x, _ = attached("linear", keep_weight=keep_weight)
    unchanged = Unchanged(net, x)
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(net[0])
    unchanged.check(storage=keep_weight)
    net[0].merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        net[0].weight = nn.Parameter(torch.ones(5, 7))
    lora.detach(net)
    with pytest.raises(RuntimeError, match="detached"):
        attached_layer(net, module).weight = nn.Parameter(torch.ones(5, 7))


def attached_layer(net: nn.Sequential, module: nn.Module) -> Any:
    """A layer that was attached to a model and detached again."""
    lora.attach(net, {"0.lora_A.weight": torch.ones(1, 7), "0.lora_B.weight": torch.ones(5, 1)})
    layer = net[0]
    lora.detach(net)
    assert net[0] is module
    return layer


@KEEP
def test_loading_puts_other_parameters_in_their_place(keep_weight: bool) -> None:
    net, module, x, adapter = attached("linear", keep_weight=keep_weight)
    state = {key: torch.randn_like(value) for key, value in net.state_dict().items()}
    net.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    assert_close_to(net(x).detach(), x, state["0.weight"], state["0.bias"], (adapter, 1.0))
    lora.detach(net)
    assert torch.equal(module.weight, state["0.weight"])


def test_each_of_fused_projections_is_what_it_replaces() -> None:
    attention = pytest.importorskip("diffusers.models.attention_processor")
    block = attention.Attention(query_dim=16, heads=2, dim_head=8).eval().requires_grad_(False)
    block.to_k = Named(16, 16, "k").requires_grad_(False)
    originals, x = {name: getattr(block, name) for name in ("to_q", "to_k", "to_v")}, torch.randn(3, 10, 16)
    state = {}
    for name in originals:
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = pair(2, 16, 16)
    alone = copy.deepcopy(block)
    lora.attach(block, state)
    assert block.to_q._frozen is block.to_k._frozen
    assert all(isinstance(getattr(block, name), type(module)) for name, module in originals.items())
    weight = torch.randn(16, 16)
    for one in (block, alone):
        one.to_v.weight = nn.Parameter(weight.clone())
        one.to_k.bias = None
        one.to_q.foo = 1
    lora.attach(alone, state, fuse=False)
    torch.testing.assert_close(block(x), alone(x), rtol=1e-5, atol=1e-5)
    lora.detach(block)
    assert all(getattr(block, name) is module for name, module in originals.items())
    assert torch.equal(block.to_v.weight, weight)
    assert (block.to_q.foo, block.to_k.label, block.to_k.bias) == (1, "k", None)


def test_a_class_that_has_no_subclasses_is_refused() -> None:
    net = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 5)).requires_grad_(False)
    net[1].__class__ = Final
    unchanged = Unchanged(net, torch.randn(3, 7))
    state = {
        f"{i}.lora_{half}.weight": factor for i in (0, 1) for half, factor in zip("AB", factors(net[i]), strict=True)
    }
    with pytest.raises(TypeError, match="Final is none: Final is final"):
        lora.attach(net, state, keep_weight=False)
    unchanged.check(storage=False)


def test_compile_of_a_layer_counts_after_attach_only(compiler: Any) -> None:
    net = nn.Sequential(nn.Linear(7, 5)).requires_grad_(False)
    x, (down, up) = torch.randn(3, 7), factors(net[0])
    state = {"0.lora_A.weight": down, "0.lora_B.weight": up}
    plain = net(x)
    lora.attach(net, state)
    want = net(x)
    net[0].compile(backend=compiler)
    torch.testing.assert_close(net(x), want)
    assert compiler.frame_count == 1
    lora.detach(net)
    assert torch.equal(net(x), plain)
    net[0].compile(backend=compiler)
    with pytest.raises(TypeError, match=r"compile\(\) was called: call it after attach"):
        lora.attach(net, state)


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
def test_a_method_that_was_bound_to_the_layer_is_the_modules_after_detach(method: str) -> None:
    net, module, x, _ = attached("conv2d")
    layer = net[0]
    setattr(layer, method, getattr(type(layer), method).__get__(layer))
    lora.detach(net)
    assert vars(module)[method].__self__ is module
    torch.testing.assert_close(net(x), nn.functional.conv2d(x, module.weight, module.bias))


@KEEP
def test_half_and_back(keep_weight: bool) -> None:
    net, module, x, _ = attached("linear", keep_weight=keep_weight)
    want = net(x)
    net.double().to(torch.float32)
    assert torch.equal(net(x), want)
    net.bfloat16()
    assert net(x.bfloat16()).dtype == torch.bfloat16
    assert {name: p.dtype for name, p in net.named_parameters()} == {
        "0.weight": torch.bfloat16,
        "0.bias": torch.bfloat16,
    }
    lora.detach(net)
    assert net[0] is module
    assert module(x.bfloat16()).dtype == torch.bfloat16
