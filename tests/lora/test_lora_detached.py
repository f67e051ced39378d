"""Whoever holds a layer after detach is refused, and the weights that went back to the model stay what they were."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample import lora
from fastsample.lora import LoRALinear
from fastsample.lora.layers import frozen_linears
from fastsample.lora.layers.adapted import AdaptedLayer
from support.lora_modules import KEEP, Net, Unchanged, X, file, layer_with, pair, small_unet

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

FACTORS = pair(1, 6, 6)
STATE = {"0.lora_A.weight": FACTORS[0], "0.lora_B.weight": FACTORS[1]}
REFUSED = "was detached: lora.detach gave its place"
USES: dict[str, Callable[[Any], Any]] = {
    "call": lambda layer: layer(X if isinstance(layer, lora.LoRAConv2d) else torch.ones(2, layer.in_features)),
    "indexed": lambda layer: layer(torch.ones(2, 3, 6, 6), torch.tensor([0, 0])),
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.to(torch.float64),
    "meta": lambda layer: layer.to("meta"),
    "share": lambda layer: layer.share_memory(),
    "merge": lambda layer: layer.merge(),
    "unmerge": lambda layer: layer.unmerge(),
    "add": lambda layer: layer.add_adapter("b", [FACTORS]),
    "swap": lambda layer: layer.swap_adapter("default", [FACTORS]),
    "set": lambda layer: layer.set_adapters({}),
    "remove": lambda layer: layer.remove_adapter("default"),
    "state_dict": lambda layer: layer.state_dict(),
    "load_state_dict": lambda layer: layer.load_state_dict({"weight": layer.weight * 0, "bias": layer.bias * 0}),
    "not-strict": lambda layer: layer.load_state_dict({"weight": layer.weight * 0}, strict=False),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda layer: torch.save(layer, io.BytesIO()),
    "attach": lambda layer: lora.attach(nn.Sequential(layer), STATE),
    "set-of-a-tree": lambda layer: lora.set_adapters(nn.Sequential(layer), {}),
    "index-of-a-tree": lambda layer: lora.set_adapter_index(nn.Sequential(layer), torch.tensor([0])),
    "swap-of-a-tree": lambda layer: lora.swap(nn.Sequential(layer), file("first")),
    "state-of-a-tree": lambda layer: lora.state_dict(nn.Sequential(layer)),
}  # fmt: skip


def detached(keep_weight: bool, merged: bool = False) -> tuple[Net, Unchanged, dict[str, AdaptedLayer]]:
    """A network after attach and detach, how it was, and the layers that went."""
    net = Net()
    before = Unchanged(net)
    lora.attach(net, file(), keep_weight=keep_weight)
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, AdaptedLayer)}
    if merged:
        for layer in layers.values():
            layer.merge()
    lora.detach(net)
    return net, before, layers


@KEEP
@pytest.mark.parametrize("name", ["first", "conv"])
@pytest.mark.parametrize("use", USES)
def test_a_detached_layer_refuses_and_leaves_the_weights(use: str, name: str, keep_weight: bool) -> None:
    _, before, layers = detached(keep_weight)
    with pytest.raises(RuntimeError, match=REFUSED):
        USES[use](layers[name])
    before.check(storage=keep_weight)


@KEEP
def test_so_do_layers_that_were_merged(keep_weight: bool) -> None:
    _, before, layers = detached(keep_weight, merged=True)
    for layer in layers.values():
        for use in ("call", "half", "unmerge", "merge"):
            with pytest.raises(RuntimeError, match=REFUSED):
                USES[use](layer)
    before.check(storage=False)


@KEEP
def test_repacking_is_refused(keep_weight: bool) -> None:
    _, before, layers = detached(keep_weight)
    layer = layers["first"]
    assert isinstance(layer, LoRALinear)
    with pytest.raises(RuntimeError, match=REFUSED):
        layer.repack()
    before.check(storage=keep_weight)


def test_a_detached_layer_shows_itself_and_holds_no_adapters() -> None:
    _, _, layers = detached(keep_weight=False)
    assert "adapters=none" in repr(layers["first"])
    assert layers["first"].adapters == ()
    assert not layers["first"].weight.isnan().any()


@KEEP
def test_fused_projections_refuse(keep_weight: bool) -> None:
    pytest.importorskip("diffusers")
    unet = small_unet().eval()
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 2, 12)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with torch.no_grad():
        want = unet(*inputs).sample
    name = next(name for name, module in unet.named_modules() if module is block)
    state = {f"{name}.to_q.lora_A.weight": torch.ones(1, 8), f"{name}.to_q.lora_B.weight": torch.ones(8, 1)}
    lora.attach(unet, state, keep_weight=keep_weight)
    processor, projection = block.processor, block.processor.projection
    lora.detach(unet)
    for use in (
        lambda: projection(torch.ones(1, 2, 8)),
        projection.half,
        projection.repack,
        projection.merge,
        projection.state_dict,
        lambda: copy.deepcopy(projection),
        lambda: projection.linear(1)(torch.ones(1, 8)),
    ):
        with pytest.raises(RuntimeError, match=REFUSED):
            use()
    with pytest.raises(RuntimeError, match=REFUSED):
        copy.deepcopy(processor)
    # A processor that somebody puts back computes with the block's own linears.
    block.processor = processor
    with torch.no_grad():
        assert (unet(*inputs).sample - want).abs().max() <= 500 * torch.finfo(torch.float32).eps * want.abs().max()
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_another_model_that_holds_a_detached_layer_gets_its_module_back() -> None:
    net = Net()
    other = nn.Sequential(net.first)
    lora.attach(net, file("first"), keep_weight=False)
    other[0] = net.first
    lora.detach(net)
    with pytest.raises(RuntimeError, match=REFUSED):
        other(torch.ones(1, 6))
    lora.detach(other)
    assert other[0] is net.first
    assert type(other[0]) is nn.Linear


@KEEP
def test_a_detach_that_fails_leaves_every_layer_in_use(keep_weight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    lora.attach(net, file(), keep_weight=keep_weight)
    before, calls = Unchanged(net), []
    restore = frozen_linears.FrozenLinears.restore

    def fails(frozen: frozen_linears.FrozenLinears) -> None:
        calls.append(frozen)
        if len(calls) == 3:
            raise MemoryError
        restore(frozen)

    monkeypatch.setattr(frozen_linears.FrozenLinears, "restore", fails)
    with pytest.raises(MemoryError):
        lora.detach(net)
    monkeypatch.setattr(frozen_linears.FrozenLinears, "restore", restore)
    before.check(storage=False)
    lora.detach(net)


def test_the_original_moved_while_its_weight_is_released_gives_it_back() -> None:
    """What moves is the NaN that stands for the weight."""
    linear = nn.Linear(7, 5)
    weight = linear.weight.detach().clone()
    layer, x = LoRALinear.from_linear(linear, keep_weight=False), torch.randn(3, 7, dtype=torch.float64)
    linear.double()
    with pytest.raises(RuntimeError, match="repack"):
        layer(x)
    layer.repack()
    assert torch.equal(layer.state_dict()["weight"], weight.double())
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight.double(), linear.bias))


@KEEP
@pytest.mark.parametrize("merged", [False, True], ids=["active", "merged"])
def test_calls_beside_detach_are_right_or_refused(keep_weight: bool, merged: bool) -> None:
    """In every round four threads call one layer while a fifth detaches it."""
    x, state = torch.randn(4, 6), file("first")
    for _ in range(25):
        net = Net()
        weight = net.first.weight.detach().clone()
        lora.attach(net, state, keep_weight=keep_weight)
        layer, odd = net.first, list[str]()
        if merged:
            layer.merge()
        want = layer(x)
        start = threading.Barrier(5)

        def call(layer: Any = layer, want: Tensor = want, odd: list[str] = odd, start: Any = start) -> None:
            start.wait(10)
            for _ in range(1000):
                try:
                    got = layer(x)
                except RuntimeError as error:
                    odd += [] if "was detached" in str(error) else [str(error)]
                    return
                if not torch.equal(got, want):
                    odd.append("another result")
            odd.append("never refused")

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        start.wait(10)
        lora.detach(net)
        for thread in threads:
            thread.join(20)
        assert not odd
        assert torch.equal(net.first.weight, weight)


def test_a_first_call_that_waits_for_detach_does_not_pack_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy packs itself at its first call, which comes while detach holds the weights."""
    net = Net()
    lora.attach(net, file("first"), keep_weight=False)
    net = copy.deepcopy(net)
    layer, weight = net.first, net.first.weight.detach().clone()
    errors, inside = list[Exception](), threading.Event()
    restore = frozen_linears.FrozenLinears.restore

    def call() -> None:
        inside.set()
        try:
            layer(torch.ones(1, 6))
        except RuntimeError as error:
            errors.append(error)

    caller = threading.Thread(target=call)

    def slow(frozen: frozen_linears.FrozenLinears) -> None:
        restore(frozen)
        caller.start()
        inside.wait(10)
        caller.join(0.05)

    monkeypatch.setattr(frozen_linears.FrozenLinears, "restore", slow)
    lora.detach(net)
    caller.join(10)
    assert "was detached" in str(errors)
    assert torch.equal(net.first.weight, weight)


def test_a_layer_of_ones_own_is_not_detached() -> None:
    layer = layer_with(pair(2))
    net = nn.Sequential(layer)
    lora.detach(net)
    assert net[0] is layer
    assert torch.isfinite(layer(torch.ones(1, 7))).all()
