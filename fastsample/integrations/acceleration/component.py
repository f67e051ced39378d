"""One network of a pipeline: what is taken out of it, what stands in its place, and how it comes back."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fastsample.integrations.acceleration.peft import (
    active_in,
    is_wrapped,
    pair_of,
    peft_layers,
    weights_of,
    why_left,
)
from fastsample.integrations.acceleration.projections import Group, groups_of, shared_layers
from fastsample.integrations.acceleration.report import ComponentReport
from fastsample.integrations.acceleration.scaling import follow_scale, unfollow_scale
from fastsample.lora.layers.adapted import AdaptedLayer, why_not
from fastsample.lora.layers.adapter_set import AdapterSet
from fastsample.lora.layers.conv import conv_layer, kind_of
from fastsample.lora.layers.frozen import FrozenLayers, release
from fastsample.lora.layers.hooks import moved_together, moves
from fastsample.lora.layers.linear import linear_layers
from fastsample.lora.layers.slots import slots_of
from fastsample.lora.tree import active_of, frozen_of, layers_of, put
from fastsample.ops.lora.weights import pack_linear

# Where a network keeps what accelerate has done to it: a copy of the network then knows it too.
_RECORD = "_accelerated"
# diffusers' methods that read PEFT's layers or change them, or fuse projections.
_METHODS = (
    *("load_lora_adapter", "save_lora_adapter", "save_pretrained", "unload_lora", "fuse_lora", "unfuse_lora"),
    *("set_adapters", "set_adapter", "add_adapter", "delete_adapters", "active_adapters"),
    *("enable_lora", "disable_lora", "enable_adapters", "disable_adapters", "enable_lora_hotswap"),
    *("fuse_qkv_projections", "unfuse_qkv_projections"),
)

# What stands in a network, and what each of them stands for.
_Layers = dict[AdaptedLayer, nn.Module]


@dataclass(eq=False)
class _Record:
    """What accelerate has done to a network.

    Attributes:
        originals: what was in the place of each of its layers.
        adapters: the names of the moved adapters.
        report: what it said.
    """

    originals: _Layers
    adapters: frozenset[str]
    report: ComponentReport


@dataclass(eq=False)
class _Plan:
    """What there is to do.

    Attributes:
        groups: projections that can run as one.
        layers: PEFT's layers that can be moved, with their paths.
        weights: by which set_adapters has multiplied each adapter, None where no one number says it.
        active: the active adapters, with the weights that they will have.
        left: as a ComponentReport's.
    """

    groups: list[Group]
    layers: dict[nn.Module, str]
    weights: dict[str, float | None]
    active: dict[str, float]
    left: dict[str, tuple[str, ...]]


def record_of(module: nn.Module) -> _Record | None:
    """What accelerate has done to the network, None where restore has brought it back."""
    record: _Record | None = vars(_whole(module)).get(_RECORD)
    return record


def _whole(module: nn.Module) -> nn.Module:
    """The network itself, which torch.compile may have wrapped."""
    return module._modules.get("_orig_mod") or module


def accelerate_component(name: str, module: nn.Module) -> ComponentReport:
    """Fuses a network's projections and moves its adapters, or raises and changes nothing.

    A network that is accelerated already stays as it is, unless PEFT has put other layers into it.
    """
    if (record := record_of(module)) is not None:
        if later_adapters(module) or not _has_movable(module):
            return _report_now(record)
        restore_component(module)
    if reason := _why_not(module):
        return ComponentReport(name, left={reason: ()})
    plan = _plan(module)
    layers = _adapted(plan)
    report = _report(name, plan)
    vars(module)[_RECORD] = _Record(layers, frozenset(plan.weights), report)
    try:
        if layers:
            put(module, {original: layer for layer, original in layers.items()})
        _follow(module, layers, plan)
    except BaseException:
        restore_component(module)
        raise
    return report


def _report_now(record: _Record) -> ComponentReport:
    """The same report with the weights that lora.set_adapters may have set since."""
    active = active_of(frozen_of(record.originals))
    return replace(record.report, weights={name: active[name] for name in active if name in record.adapters})


def check_restorable(name: str, module: nn.Module) -> None:
    """Raises RuntimeError where a network has adapters that came after accelerate and stand on its layers."""
    if later := later_adapters(module):
        raise RuntimeError(
            f"the pipeline's {name} has LoRAs that were attached after accelerate: lora.detach() {later} first"
        )


def later_adapters(module: nn.Module) -> str:
    """The names of these adapters."""
    record = record_of(module)
    frozen = frozen_of(record.originals) if record else []
    names = {name for layers in frozen for name in layers.adapters.slots}
    return ", ".join(sorted(map(repr, names - record.adapters if record else names)))


def restore_component(module: nn.Module) -> None:
    """Brings a network back to what it was, the very modules in their places."""
    module = _whole(module)
    record: _Record | None = vars(module).pop(_RECORD, None)
    if record is None:
        return
    for name in _METHODS:
        if isinstance(vars(module).get(name), _ThroughPeft):
            del vars(module)[name]
    unfollow_scale(module)
    release(frozen_of(record.originals))
    put(module, {layer: original for layer, original in record.originals.items()})


def _why_not(module: nn.Module) -> str:
    """Why a network is left as a whole."""
    if _whole(module) is not module or any(getattr(m, "_compiled_call_impl", None) for m in module.modules()):
        return "it is compiled, accelerate comes before torch.compile"
    if getattr(module, "hf_quantizer", None) is not None or getattr(module, "is_quantized", False):
        return "its weights are quantized"
    if is_wrapped(module):
        return "a PeftModel is around it: its get_base_model() can be accelerated"
    if _weights_move(module):
        return "hooks of accelerate or diffusers move or cast its weights"
    if layers_of(module, detached=True):
        return "it has layers of fastsample.lora already"
    return ""


def _weights_move(module: nn.Module) -> bool:
    # diffusers' hooks on larger parts are caches, but for those that move groups of layers.
    layers = [part for part in module.modules() if "_hf_hook" in vars(part) or isinstance(part, nn.Linear | _ConvNd)]
    return any(map(moves, layers)) or bool(moved_together(module))


def _plan(module: nn.Module) -> _Plan:
    left: dict[str, tuple[str, ...]] = {}
    layers: dict[nn.Module, str] = {}
    for path, layer in peft_layers(module).items():
        if (reason := why_left(layer)) is not None:
            left[reason] = (*left.get(reason, ()), path)
        else:
            layers[layer] = path

    def linear_of(child: nn.Module) -> nn.Linear | str:
        linear = child.base_layer if child in layers else child
        if (reason := why_not(linear, nn.Linear)) is None:
            assert isinstance(linear, nn.Linear)
            return _why_no_kernel(linear.weight.dtype, linear.weight.device) or linear
        return "a projection has a LoRA that is left" if hasattr(linear, "base_layer") else f"a projection: {reason}"

    groups = []
    for group in groups_of(module, linear_of):
        if group.reason:
            left[group.reason] = (*left.get(group.reason, ()), group.path or "the network itself")
        else:
            groups.append(group)
    weights = weights_of(layers)
    active = dict.fromkeys(name for layer in layers for name in active_in(layer))
    known = {name: 1.0 if (weight := weights[name]) is None else weight for name in active}
    return _Plan(groups, layers, weights, known, left)


def _has_movable(module: nn.Module) -> bool:
    return any(why_left(layer) is None and len(layer.lora_A) for layer in peft_layers(module).values())


def _why_no_kernel(dtype: torch.dtype, device: torch.device) -> str:
    if pack_linear([torch.zeros(1, 1, dtype=dtype, device=device)]).offers:
        return ""
    return f"no kernel serves {str(dtype).removeprefix('torch.')} on {device.type}"


def _adapted(plan: _Plan) -> _Layers:
    """The layers that will stand in the network, with what they stand for, packed and with their adapters."""
    layers: _Layers = {}
    try:
        for group in plan.groups:
            layers.update(zip(shared_layers(group.linears), group.children, strict=True))
        fused = set(layers.values())
        for child in plan.layers:
            if child not in fused and len(child.lora_A):  # type: ignore[arg-type]
                layers[_single(child.base_layer)] = child  # type: ignore[arg-type]
        for frozen in frozen_of(layers):
            frozen.change(_adapters_of(frozen, layers, plan))
    except BaseException:
        release(frozen_of(layers))
        raise
    return layers


def _single(base: nn.Module) -> AdaptedLayer:
    return linear_layers([base], True, None)[0] if kind_of(base) is nn.Linear else conv_layer(base, weights_move=False)


def _adapters_of(frozen: FrozenLayers, layers: _Layers, plan: _Plan) -> AdapterSet:
    """The adapters that PEFT's layers in the place of these layers have."""
    children: list[Any] = [layers[layer] for layer in frozen.layers]  # type: ignore[index]
    slots = {}
    for name in plan.weights:
        # An adapter that is active elsewhere and not here adds nothing here.
        held = [
            child in plan.layers and name in child.lora_A and (name in active_in(child) or name not in plan.active)
            for child in children
        ]
        if any(held):
            found = [pair_of(c, name, plan.weights) if h else (None, 1.0) for c, h in zip(children, held, strict=True)]
            pairs, factors = zip(*found, strict=True)
            slots[name] = tuple(slots_of(pairs, frozen.layers, factors, None))
    return AdapterSet(frozen.layers, slots, plan.active)


def _report(name: str, plan: _Plan) -> ComponentReport:
    fused: dict[str, str] = {}
    for group in plan.groups:
        names = ", ".join(group.names)
        fused[group.path] = f"{fused[group.path]} and {names}" if group.path in fused else names
    moved = {
        adapter: tuple(path for layer, path in plan.layers.items() if adapter in layer.lora_A)  # type: ignore[operator]
        for adapter in plan.weights
    }
    left = dict(plan.left)
    if not plan.groups and not left:
        left["it has no attention projections"] = ()
    return ComponentReport(name, fused, moved, plan.active, left)


def _follow(module: nn.Module, layers: _Layers, plan: _Plan) -> None:
    """Keeps diffusers' own ways to the adapters open."""
    for name in _METHODS:
        if callable(getattr(type(module), name, None)) and name not in vars(module):
            vars(module)[name] = _ThroughPeft(module, name)
    if plan.weights and layers:
        follow_scale(module, frozen_of(layers))


class _ThroughPeft:
    """A method of diffusers that runs on the network as it was, which is accelerated again after it."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    @property
    def __signature__(self) -> inspect.Signature:
        # save_pretrained of a pipeline looks there for what it may pass on.
        return inspect.signature(getattr(type(self.module), self.name).__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        record = record_of(self.module)
        assert record is not None
        check_restorable(record.report.name, self.module)
        restore_component(self.module)
        try:
            return getattr(self.module, self.name)(*args, **kwargs)
        finally:
            accelerate_component(record.report.name, self.module)
