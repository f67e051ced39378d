"""A module tree's adapted layers: finding them, putting them in place, checking what concerns all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

# Earlier pickles name the private ones here.
from fastsample.lora.called import _calls_its_linears, _refuse_to_fuse, keep_called  # noqa: F401
from fastsample.lora.layers.adapted import AdaptedLayer, check_replaceable
from fastsample.lora.layers.conv import conv_layer, kind_of
from fastsample.lora.layers.frozen import FrozenLayers, release
from fastsample.lora.layers.hooks import hand_over, hand_over_groups, moved_together, moves
from fastsample.lora.layers.linear import QKVProjection, linear_layers
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
    for old, new in replacements.items():
        hand_over(old, new)
    hand_over_groups(module, replacements)
    keep_called(module)


def moving_in(module: nn.Module) -> set[nn.Module]:
    """The modules of a tree whose weights hooks of accelerate or diffusers move or cast."""
    return {part for part in module.modules() if moves(part)} | moved_together(module)


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
                check_replaceable(old, kind_of(old), hooked=True)
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
    modules: Iterable[nn.Module],
    blocks: Mapping[nn.Module, list[nn.Linear]],
    keep_weight: bool,
    moving: Container[nn.Module],
) -> Iterator[Replacements]:
    """Adapted layers for linears, convolutions and attention blocks, released again if the block raises.

    `moving` are the modules whose weights hooks move.
    """
    layers: dict[nn.Module, AdaptedLayer] = {}
    projections: dict[nn.Module, QKVProjection] = {}
    try:
        for block, linears in blocks.items():
            projections[block] = QKVProjection.from_linears(linears, keep_weight=keep_weight)
            layers.update((linear, projections[block].linear(i)) for i, linear in enumerate(linears))
        for module in modules:
            if kind_of(module) is not nn.Linear:
                layers[module] = conv_layer(module, weights_move=module in moving)
            elif module not in layers:
                [layers[module]] = linear_layers([module], keep_weight, None, weights_move=module in moving)
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
