"""Hooks of accelerate and diffusers that move or cast weights, before attach and after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample import lora
from support.lora_modules import KEEP, Net, X, assert_same, file, merged, small_unet

accelerate = pytest.importorskip("accelerate")
casting = pytest.importorskip("diffusers.hooks.layerwise_casting")
offloading = pytest.importorskip("diffusers.hooks.group_offloading")

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

State = dict[str, Tensor]
CPU = torch.device("cpu")


def _groups(level: str, disk: bool) -> Callable[[nn.Module, Path], Any]:
    def apply(net: nn.Module, folder: Path) -> None:
        if disk and "offload_to_disk_path" not in signature(offloading.apply_group_offloading).parameters:
            pytest.skip("this diffusers offloads groups to memory alone")
        where = {"offload_to_disk_path": str(folder)} if disk else {}
        offloading.apply_group_offloading(net, CPU, CPU, level, num_blocks_per_group=1, **where)

    return apply


def _cast(net: nn.Module, _: Path) -> None:
    casting.apply_layerwise_casting(net, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("skipped",))


# Offloading to disk takes the weights away between calls on a CPU too.
HOOKS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu-offload": lambda net, _: accelerate.cpu_offload(net, CPU),
    "placed": lambda net, _: accelerate.hooks.attach_execution_device_hook(net, CPU),
    "model-offload": lambda net, _: accelerate.cpu_offload_with_hook(net, CPU),
    "disk-offload": lambda net, folder: accelerate.disk_offload(net, str(folder), CPU),
    "leaf-groups": _groups("leaf_level", disk=False),
    "block-groups": _groups("block_level", disk=False),
    "leaf-groups-disk": _groups("leaf_level", disk=True),
    "block-groups-disk": _groups("block_level", disk=True),
    "casting": _cast,
}
EACH = pytest.mark.parametrize("hook", HOOKS)


@pytest.fixture
def net() -> Net:
    return Net().eval().requires_grad_(False)


def plain_of(net: Net, hook: str) -> Net:
    """The network without hooks, its weights rounded as casting rounds them."""
    plain = copy.deepcopy(net)
    for part in plain.modules() if hook == "casting" else ():
        for parameter in part._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    return plain


def run(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(X)


@EACH
@KEEP
def test_attach_after_hooks(net: Net, hook: str, keep_weight: bool, tmp_path: Path) -> None:
    plain, one, two, three = (
        plain_of(net, hook),
        file(),
        file("blocks.0.0 first conv", rank=3),
        file("conv first", rank=1),
    )
    HOOKS[hook](net, tmp_path)
    modules, want = dict(net.named_modules()), run(net)
    report = lora.attach(net, one, "one", capacity=3, keep_weight=keep_weight)
    assert len(report.matched) == 5
    assert_same(run(net), merged(plain, (one, 1.0))(X))
    lora.attach(net, two, "two", keep_weight=keep_weight)
    lora.set_adapters(net, {"one": 0.5, "two": 2.0})
    assert_same(run(net), merged(plain, (one, 0.5), (two, 2.0))(X))
    lora.set_adapter_index(net, torch.tensor([1, -1, 0, 1]))
    wants = [merged(plain, (two, 2.0)), plain, merged(plain, (one, 0.5)), merged(plain, (two, 2.0))]
    assert_same(run(net), torch.stack([want(X)[i] for i, want in enumerate(wants)]))
    lora.set_adapter_index(net, None)
    lora.swap(net, three, "one")
    assert_same(run(net), merged(plain, (three, 0.5), (two, 2.0))(X))
    lora.detach(net, "two")
    lora.detach(net)
    assert dict(net.named_modules()) == modules
    assert torch.equal(run(net), want)


@KEEP
@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != "block-groups-disk"])
def test_hooks_after_attach(net: Net, hook: str, keep_weight: bool, tmp_path: Path) -> None:
    plain, one, two = plain_of(net, hook), file(), file("blocks.0.0 first conv", rank=3)
    modules = dict(net.named_modules())
    lora.attach(net, one, "one", keep_weight=keep_weight)
    run(net)
    HOOKS[hook](net, tmp_path)
    assert_same(run(net), merged(plain, (one, 1.0))(X))
    lora.attach(net, two, "two", keep_weight=keep_weight)
    assert_same(run(net), merged(plain, (one, 1.0), (two, 1.0))(X))
    lora.detach(net)
    assert dict(net.named_modules()) == modules
    assert_same(run(net), plain(X))


@KEEP
def test_blocks_on_a_disk_after_attach_are_refused(net: Net, keep_weight: bool, tmp_path: Path) -> None:
    """No hook is on the layers, and what comes from the disk may be other weights."""
    lora.attach(net, file(), keep_weight=keep_weight)
    # What was released has no storage that diffusers could write to a file.
    error = RuntimeError if keep_weight else ValueError
    with pytest.raises(error, match=r"detach\(\) before the change and attach\(\) after|non contiguous"):
        HOOKS["block-groups-disk"](net, tmp_path)
        run(net)


def test_weights_that_hooks_leave_in_place_stay_packed(net: Net) -> None:
    HOOKS["placed"](net, Path())
    lora.attach(net, file())
    assert net.first._frozen._packed is not None


@pytest.mark.parametrize("first", ["attach", "hooks"])
@pytest.mark.parametrize("hook", ["cpu-offload", "leaf-groups-disk", "block-groups"])
def test_projections_of_attention_run_their_hooks(first: str, hook: str, tmp_path: Path) -> None:
    unet = small_unet().eval().requires_grad_(False)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 12)
    state = {}
    for name, layer in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v")):
            state[f"{name}.lora_A.weight"] = torch.randn(2, layer.in_features) / 4
            state[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 2) / 4
    twin = copy.deepcopy(unet)
    lora.attach(twin, state)
    for step in (first, *({"attach", "hooks"} - {first})):
        HOOKS[hook](unet, tmp_path) if step == "hooks" else lora.attach(unet, state)
    with torch.no_grad():
        got, want = (model(x, torch.tensor([3, 50]), context).sample for model in (unet, twin))
    # A whole UNet in float32, the products of q, k and v summed one by one.
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("first", ["attach", "hooks"])
@KEEP
def test_removed_hooks_leave_the_adapters(net: Net, first: str, keep_weight: bool) -> None:
    plain, state = copy.deepcopy(net), file()
    for step in (first, *({"attach", "hooks"} - {first})):
        if step == "hooks":
            accelerate.cpu_offload(net, CPU)
        else:
            lora.attach(net, state, keep_weight=keep_weight)
    want = merged(plain, (state, 1.0))(X)
    assert_same(run(net), want)
    accelerate.hooks.remove_hook_from_module(net, recurse=True)
    assert_same(run(net), want)
    assert net.first._frozen._packed is None
    for layer in (net.first, net.blocks[0][0]):
        layer.repack()
    assert net.first._frozen._packed is not None
    assert_same(run(net), want)
    twin = copy.deepcopy(net)
    assert_same(run(twin), want)
    for one in (net, twin):
        lora.detach(one)
        assert torch.equal(run(one), plain(X))


def test_a_copy_with_hooks_is_its_own(net: Net) -> None:
    plain, state = copy.deepcopy(net), file()
    accelerate.cpu_offload(net, CPU)
    lora.attach(net, state)
    twin = copy.deepcopy(net)
    lora.set_adapters(twin, {})
    assert_same(run(twin), plain(X))
    assert_same(run(net), merged(plain, (state, 1.0))(X))
    lora.detach(twin)
    assert_same(run(twin), plain(X))
    assert_same(run(net), merged(plain, (state, 1.0))(X))


@pytest.mark.parametrize("first", ["attach", "hooks"])
@pytest.mark.parametrize("hook", ["cpu-offload", "casting", "leaf-groups-disk"])
def test_weights_that_move_are_not_merged(net: Net, first: str, hook: str, tmp_path: Path) -> None:
    state = file()
    if first == "attach":
        lora.attach(net, state)
    HOOKS[hook](net, tmp_path)
    if first == "hooks":
        lora.attach(net, state)
    want = run(net)
    for layer in (net.first, net.conv):
        with pytest.raises(RuntimeError, match="merge: hooks of accelerate or diffusers move or cast the weights"):
            layer.merge()
    assert torch.equal(run(net), want)


@pytest.mark.parametrize("hook", ["cpu-offload", "casting", "leaf-groups"])
def test_hooks_on_merged_layers_are_refused(net: Net, hook: str, tmp_path: Path) -> None:
    lora.attach(net, file())
    for layer in (net.conv, net.first, net.blocks[0][0], net.blocks[0][2], net.blocks[1][2]):
        layer.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        HOOKS[hook](net, tmp_path)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def wrapped(linear: nn.Linear) -> nn.Linear:
    """By a function that is neither library's."""
    inner = linear.forward
    linear.forward = lambda x: inner(x) * 2  # type: ignore[method-assign]
    return linear


@pytest.mark.parametrize("make", [lambda: Doubled(6, 6), lambda: wrapped(nn.Linear(6, 6))], ids=["class", "function"])
@pytest.mark.parametrize("hooked", [False, True])
def test_other_forwards_are_refused_with_hooks_too(net: Net, make: Callable[[], nn.Module], hooked: bool) -> None:
    net.first = net.again = make().requires_grad_(False)
    if hooked:
        accelerate.cpu_offload(net, CPU)
    before, want = dict(net.named_modules()), run(net)
    with pytest.raises(TypeError, match=r"first: .*its forward is not Linear's own"):
        lora.attach(net, file())
    assert dict(net.named_modules()) == before
    assert torch.equal(run(net), want)


def test_layers_of_ones_own_take_no_hooked_linear() -> None:
    linear = nn.Linear(7, 5)
    accelerate.cpu_offload(linear, CPU)
    with pytest.raises(TypeError, match="its forward is not Linear's own"):
        lora.LoRALinear.from_linear(linear)


def test_weights_that_went_to_another_device_are_read_where_they_are(net: Net) -> None:
    """As offloading does that no hook on the layers tells of. There is no second device here but meta."""
    lora.attach(net, file("first conv"))
    before, want = {layer: dict(layer._parameters) for layer in (net.first, net.conv)}, run(net)
    for layer, parameters in before.items():
        layer._parameters.update({name: nn.Parameter(p.to("meta")) for name, p in parameters.items()})
    assert net.conv(X.to("meta")).is_meta
    with pytest.raises(RuntimeError, match="meta"):
        net.first(torch.ones(2, 6))
    for layer, parameters in before.items():
        layer._parameters.update(parameters)
    assert net.first._frozen.weights_move
    assert net.conv._frozen.weights_move
    assert_same(run(net), want)
