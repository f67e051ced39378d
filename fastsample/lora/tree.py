"""A module tree's adapted layers: finding them, putting them in place, checking what concerns all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from fastsample.lora.layers.adapted import AdaptedLayer, check_replaceable
from fastsample.lora.layers.conv import LoRAConv2d
from fastsample.lora.layers.frozen import FrozenLayers, release
from fastsample.lora.layers.linear import LoRALinear, QKVProjection
from fastsample.lora.layers.slots import Slot


def layers_of(module: nn.Module, detached: bool = False) -> dict[str, AdaptedLayer]:
    """The adapted layers by name. Unless `detached` asks for them, layers that were detached raise RuntimeError."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch module, got {type(module).__name__}")
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, AdaptedLayer)}
    for frozen in () if detached else frozen_of(layers.values()):
        frozen.check_attached()
    return layers


def frozen_of(layers: Iterable[AdaptedLayer]) -> list[FrozenLayers]:
    """The FrozenLayers of the layers, each once: layers that share their adapters have one in common."""
    return list(dict.fromkeys(layer._frozen for layer in layers))


def names_of(all_frozen: Iterable[FrozenLayers]) -> dict[str, None]:
    """The names of all adapters in a tree; a single layer may have only some of them."""
    return dict.fromkeys(name for frozen in all_frozen for name in frozen.adapters.slots)


def active_of(all_frozen: Iterable[FrozenLayers]) -> dict[str, float]:
    """The active adapters of a tree, in the order that an adapter index counts."""
    active: dict[str, float] = {}
    for frozen in all_frozen:
        active = {**frozen.adapters.active, **active}
    return active


def slot_of(layer: AdaptedLayer, name: str) -> Slot | None:
    """The adapter's slot in the layer; None where the adapter leaves the layer alone or is not among its adapters."""
    slots = layer._frozen.adapters.slots
    return slots[name][layer._i] if name in slots else None


def put(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces submodules wherever the tree holds them."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    _keep_called(module)


def modules_to_replace(
    module: nn.Module,
    touched: Mapping[str, nn.Module],
    blocks: Mapping[nn.Module, list[nn.Linear]],
    keep_weight: bool,
) -> list[nn.Module]:
    """The touched modules that have no adapters yet.

    Raises:
        TypeError, ValueError: where adapted layers cannot replace them.
    """
    for path, old in touched.items():
        if not isinstance(old, AdaptedLayer):
            try:
                check_replaceable(old, nn.Conv2d if isinstance(old, nn.Conv2d) else nn.Linear)
            except TypeError as error:
                raise TypeError(f"{path}: {error}") from None
    new = [old for old in touched.values() if not isinstance(old, AdaptedLayer)]
    if not keep_weight:
        owners = Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)
        released = {*new, *(linear for linears in blocks.values() for linear in linears)}
        paths = [path for path, part in module.named_modules() if part in released and owners[id(part.weight)] > 1]
        if paths:
            raise ValueError(f"keep_weight=False would release weights that other modules share: {', '.join(paths)}")
    return new


class Replacements(NamedTuple):
    """Adapted layers that are in no tree yet.

    Attributes:
        layers: by the module that each will replace.
        projections: by the attention block whose linears it runs as one.
    """

    layers: dict[nn.Module, AdaptedLayer]
    projections: dict[nn.Module, QKVProjection]


@contextmanager
def replacements(
    modules: Iterable[nn.Module], blocks: Mapping[nn.Module, list[nn.Linear]], keep_weight: bool
) -> Iterator[Replacements]:
    """Adapted layers for linears, convolutions and attention blocks, released again if the block raises."""
    layers: dict[nn.Module, AdaptedLayer] = {}
    projections: dict[nn.Module, QKVProjection] = {}
    try:
        for block, linears in blocks.items():
            projections[block] = QKVProjection.from_linears(linears, keep_weight=keep_weight)
            layers.update((linear, projections[block].linear(i)) for i, linear in enumerate(linears))
        for module in modules:
            if isinstance(module, nn.Conv2d):
                layers[module] = LoRAConv2d.from_conv(module)
            elif isinstance(module, nn.Linear) and module not in layers:
                layers[module] = LoRALinear.from_linear(module, keep_weight=keep_weight)
        yield Replacements(layers, projections)
    except BaseException:
        release(frozen_of(layers.values()))
        raise


@contextmanager
def all_or_nothing(all_frozen: Iterable[FrozenLayers]) -> Iterator[None]:
    """Gives the layers the adapters from before the block if the block raises."""
    before = [(frozen, frozen.adapters) for frozen in all_frozen]
    for frozen, _ in before:
        frozen.check_not_merged()
    try:
        yield
    except BaseException:
        for frozen, adapters in before:
            frozen.change(adapters)
        raise


def _keep_called(module: nn.Module) -> None:
    """Keeps torch and diffusers from reading the weights of adapted linears instead of calling them."""
    for part in module.modules():
        attributes = vars(part)
        if isinstance(part, nn.TransformerEncoderLayer):
            # torch calls the linears of an encoder layer that has a hook, instead of a kernel on their weights.
            hooks = part._forward_pre_hooks
            mine = [key for key, hook in hooks.items() if hook is _calls_its_linears]
            if _adapted(part) and not mine:
                part.register_forward_pre_hook(_calls_its_linears)
            for key in () if _adapted(part) else mine:
                del hooks[key]
        elif isinstance(part, nn.TransformerEncoder):
            # Only the kernel on the weights takes the nested tensors that an encoder makes of padded sequences.
            if _adapted(part):
                attributes.setdefault("_nested_when_detached", part.use_nested_tensor)
                part.use_nested_tensor = False
            elif "_nested_when_detached" in attributes:
                part.use_nested_tensor = attributes.pop("_nested_when_detached")
        elif callable(getattr(type(part), "fuse_projections", None)):
            if any(isinstance(child, AdaptedLayer) for child in part.children()):
                attributes["fuse_projections"] = _refuse_to_fuse
            elif attributes.get("fuse_projections") is _refuse_to_fuse:
                del attributes["fuse_projections"]


def _adapted(module: nn.Module) -> bool:
    return any(isinstance(part, AdaptedLayer) for part in module.modules())


def _calls_its_linears(*_: object) -> None:
    """The hook of _keep_called."""


def _refuse_to_fuse(*_: object, **__: object) -> None:
    raise RuntimeError("fuse_projections would leave the adapters out: detach() them first")
