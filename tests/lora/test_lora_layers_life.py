"""What happens to LoRA layers after they are made: loading, moves, copies, training, hooks, compiling."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from fastsample.lora import LoRALinear
from fastsample.lora.layers import frozen_linears
from support.lora_modules import KEEP, assert_close_to, layer_with, pair, qkv

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


@KEEP
def test_state_dict_keeps_keys_values_and_parameters(keep_weight: bool) -> None:
    linear = nn.Linear(7, 5)
    parameters, before = dict(linear.named_parameters()), copy.deepcopy(linear.state_dict())
    layer = LoRALinear.from_linear(linear, keep_weight=keep_weight)
    layer.add_adapter("a", [pair(2)])
    layer(torch.ones(1, 7))
    assert {name: id(p) for name, p in layer.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    for keep_vars in (False, True):
        state = layer.state_dict(keep_vars=keep_vars)
        assert list(state) == list(before)
        assert all(torch.equal(state[name], before[name]) for name in before)
    other = nn.Linear(7, 5)
    layer.load_state_dict(other.state_dict())
    layer.set_adapters({})
    x = torch.randn(3, 7)
    assert_close_to(layer(x), x, other.weight.detach(), other.bias)


def test_released_weights_take_no_memory_but_look_the_same() -> None:
    linears, projection = qkv(keep_weight=False)
    for linear in linears:
        weight = linear.weight
        assert weight.untyped_storage().nbytes() == weight.element_size()
        assert weight.shape == (linear.out_features, 7)
        assert weight.isnan().all(), "what reads it by mistake must show"
    projection(torch.ones(1, 7))


@KEEP
def test_merged_layers_move_and_copy(keep_weight: bool) -> None:
    layer = layer_with(pair(2), keep_weight=keep_weight)
    before = layer.state_dict()["weight"].clone()
    layer.merge()
    twin = copy.deepcopy(layer).double()
    twin.unmerge()
    assert torch.equal(twin.state_dict()["weight"], before.double())
    layer.unmerge()
    assert torch.equal(layer.state_dict()["weight"], before)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "in-place": lambda layer: layer.weight.detach().mul_(2),
    "data": lambda layer: setattr(layer.weight, "data", torch.ones(5, 7)),
    "bias": lambda layer: layer.bias.detach().add_(1),
    "version-only": lambda layer: layer.bias.detach().add_(0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_a_weight_changed_after_packing_raises(change: str, merged: bool) -> None:
    layer, x = layer_with(pair(2)), torch.randn(3, 7)
    if merged:
        layer.merge()
    CHANGES[change](layer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"\(5, 7\) has changed since it was packed: call repack"):
            layer(x)
    layer.repack()
    adapters = (
        []
        if merged
        else [((layer._frozen.adapters.slots["a0"][0].down, layer._frozen.adapters.slots["a0"][0].up), 1.0)]
    )
    assert_close_to(layer(x), x, layer.weight.detach(), layer.bias, *adapters)


def test_a_parametrized_weight_raises() -> None:
    layer = layer_with(pair(2))
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(RuntimeError, match="has changed since it was packed"):
        layer(torch.randn(3, 7))


@pytest.mark.parametrize("change", ["data", "bias"])
def test_a_released_weight_that_was_replaced_is_the_new_one(change: str) -> None:
    layer, x = layer_with(keep_weight=False), torch.randn(3, 7)
    old = layer.state_dict()["weight"].clone()
    CHANGES[change](layer)
    new = old if change == "bias" else torch.ones(5, 7)
    with pytest.raises(RuntimeError, match="repack"):
        layer(x)
    assert torch.equal(layer.state_dict()["weight"], new)
    layer.repack()
    assert_close_to(layer(x), x, new, layer.bias)
    with pytest.raises(RuntimeError, match="single memory location"):
        layer.weight.detach().mul_(2)


@KEEP
def test_casts_move_all_linears_of_a_projection(keep_weight: bool) -> None:
    _, projection = qkv(keep_weight=keep_weight)
    projection.add_adapter("a", [pair(2), None, pair(2, out=6)])
    before = [value.clone() for value in projection.state_dict().values()]
    x = torch.randn(4, 7)
    want = projection(x)
    assert [y.dtype for y in projection.double()(x.double())] == [torch.float64] * 3
    projection.linear(0).float()
    with pytest.raises(ValueError, match="share"):
        projection(x)
    projection.float()
    assert all(torch.equal(y, z) for y, z in zip(projection(x), want, strict=True))
    assert all(torch.equal(y, z) for y, z in zip(projection.state_dict().values(), before, strict=True))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: _saved(module),
}


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@KEEP
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole_and_their_own(how: str, keep_weight: bool) -> None:
    _, projection = qkv(keep_weight=keep_weight)
    projection.add_adapter("a", [pair(2), None, pair(3, out=6)])
    x = torch.randn(4, 7)
    want, state = projection(x), projection.state_dict()
    twin = COPIES[how](projection)
    assert all(torch.equal(y, z) for y, z in zip(twin(x), want, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())
    assert twin.linear(0)._frozen is twin.linear(2)._frozen is not projection.linear(0)._frozen
    twin.set_adapters({"a": 3.0})
    twin.load_state_dict({name: value * 0 for name, value in state.items()})
    assert all(torch.equal(y, z) for y, z in zip(projection(x), want, strict=True))
    released = [linear.weight.isnan().all() for linear in projection.children()]
    assert released == [not keep_weight] * 3


@pytest.mark.parametrize("how", COPIES)
def test_copying_leaves_the_original_alone(how: str) -> None:
    _, projection = qkv(keep_weight=False)
    x, packed = torch.randn(4, 7), projection._frozen._packed.data.data_ptr()
    weights = [linear.weight.data_ptr() for linear in projection.children()]
    twin = COPIES[how](projection)
    assert projection._frozen._packed.data.data_ptr() == packed
    assert [linear.weight.data_ptr() for linear in projection.children()] == weights
    assert not any(linear.weight.isnan().any() for linear in twin.children())
    for i, linear in enumerate(twin.children()):
        alone = linear.give_back()
        assert type(alone) is nn.Linear
        assert alone.weight is linear.weight
        assert torch.equal(alone.weight, projection.state_dict()[f"{i}.weight"])
    torch.testing.assert_close(twin(x), projection(x), rtol=0, atol=0)


@KEEP
def test_two_threads_make_the_first_call(keep_weight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_with(pair(2), keep_weight=keep_weight), torch.randn(4, 7)
    want, layer = layer(x), copy.deepcopy(layer)
    original, packed = frozen_linears.pack_linear, list[Any]()
    inside, both = threading.Event(), ThreadPoolExecutor(2)

    def slow(*args: Any) -> Any:
        packed.append(original(*args))
        inside.set()
        time.sleep(0.05)  # for the other to come by
        return packed[-1]

    monkeypatch.setattr(frozen_linears, "pack_linear", slow)
    with both:
        first = both.submit(layer, x)
        inside.wait(10)
        second = both.submit(layer, x)
        assert torch.equal(first.result(10), want)
        assert torch.equal(second.result(10), want)
    assert len(packed) == 1


def test_training_is_seen_by_the_next_call() -> None:
    layer, x = layer_with(), torch.randn(4, 7)
    down, up = (factor.requires_grad_() for factor in pair(3))
    layer.add_adapter("a", [(down, up)])
    optimizer = torch.optim.SGD([down, up], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            now = (down.detach(), up.detach())
            assert_close_to(layer(x), x, layer.weight.detach(), layer.bias, (now, 1.0))


def test_made_in_inference_mode_and_used_outside() -> None:
    linear, x = nn.Linear(7, 5), torch.randn(3, 7, requires_grad=True)
    factors = pair(2)
    with torch.inference_mode():
        layer = LoRALinear.from_linear(linear, keep_weight=False)
        layer.add_adapter("a", [factors])
        layer(x)
    layer(x).sum().backward()
    weight = layer.state_dict()["weight"] + factors[1] @ factors[0]
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 7), rtol=0, atol=1e-5)


def test_hooks_mode_and_attributes_are_the_linears_own() -> None:
    linear = nn.Linear(7, 5).eval()
    linear.tag = "mine"
    calls: list[str] = []
    handle = linear.register_forward_hook(lambda *_: calls.append("before"))
    layer = LoRALinear.from_linear(linear)
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer(torch.ones(1, 7))
    assert calls == ["before", "after"]
    assert (layer.training, layer.tag, layer.in_features, layer.out_features) == (False, "mine", 7, 5)
    handle.remove()
    layer(torch.ones(1, 7))
    assert calls == ["before", "after", "after"]


@pytest.mark.parametrize("indexed", [False, True], ids=["sum", "per-sample"])
def test_compiled_once_for_all_weights_and_factors(indexed: bool, compiler: Any) -> None:
    _, projection = qkv(capacity=4)
    projection.add_adapter("a", [pair(3), None, pair(4, out=6)])
    projection.add_adapter("b", [pair(2), pair(1, out=3), None])
    compiled = torch.compile(projection, backend=compiler, fullgraph=True)
    x, index = torch.randn(4, 7), torch.tensor([0, 1, -1, 1]) if indexed else None

    def assert_right() -> None:
        with torch.no_grad():
            for got, want in zip(compiled(x, index), projection(x, index), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

    assert_right()
    packed = [id(adapters.down[0]) for _, adapters in projection._frozen._forms.values()]
    projection.set_adapters({"a": 0.5, "b": -2.0})
    assert_right()
    projection._frozen.replace("a", [pair(1), None, None], 0.5)
    assert_right()
    assert packed == [id(adapters.down[0]) for _, adapters in projection._frozen._forms.values()]
    projection.load_state_dict({name: value * 2 for name, value in projection.state_dict().items()})
    assert_right()
    assert compiler.frame_count == 1


def test_compiled_training_reads_the_factors_as_they_are(compiler: Any) -> None:
    layer, x = layer_with(), torch.randn(4, 7)
    down, up = (factor.requires_grad_() for factor in pair(3))
    layer.add_adapter("a", [(down, up)])
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    compiled(x).sum().backward()
    assert up.grad.abs().max() > 0
    with torch.no_grad():
        compiled(x)
        up.mul_(2)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-5)


def test_a_copy_packs_itself_under_compile(compiler: Any) -> None:
    layer, x = copy.deepcopy(layer_with(pair(2), keep_weight=False)), torch.randn(4, 7)
    compiled = torch.compile(layer, backend=compiler)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-5)
