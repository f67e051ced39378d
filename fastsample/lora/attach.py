"""A LoRA file on a whole model: the layers it touches, several at once, others in their place, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastsample.lora.checks import check_capacity, check_names, check_weights, finite
from fastsample.lora.files.formats import Entry, read
from fastsample.lora.files.names import Resolution, resolve
from fastsample.lora.files.prefixes import unwrapped
from fastsample.lora.files.refused import first_few
from fastsample.lora.layers import attention
from fastsample.lora.layers.adapted import AdaptedLayer, why_not
from fastsample.lora.layers.conv import kind_of
from fastsample.lora.layers.frozen import FrozenLayers, release
from fastsample.lora.layers.slots import Pair
from fastsample.lora.report import Report, refuse, report_of
from fastsample.lora.saving import folded
from fastsample.lora.tree import (
    active_of,
    all_or_nothing,
    frozen_of,
    layers_of,
    modules_to_replace,
    moving_in,
    names_of,
    put,
    replacements,
    slot_of,
)

Source = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module


def attach(
    module: nn.Module,
    source: Source,
    name: str = "default",
    scale: float = 1.0,
    *,
    alpha: float | None = None,
    strict: bool = True,
    capacity: int | None = None,
    keep_weight: bool = True,
    fuse: bool = True,
) -> Report:
    """Adds a LoRA to every layer of a model that it names, active at once with weight 1.

    Linears become LoRALinears, convolutions LoRAConv2ds (or 1ds, 3ds), in place. Each is an instance of what it
    replaces, with the same attributes. The model's state_dict() keeps its keys and values.
    Each weight acts as W + scale * alpha / r * B A, A and B rounded to W's dtype. W is frozen: gradients reach x, A and
    B alone. alpha is r where nothing states it: not the argument, a key X.alpha, the header of a safetensors file,
    adapter_config.json beside it, nor PEFT's layers; the report says what did.

    Args:
        module: a diffusers UNet or transformer, a text encoder, or any other torch module.
        source: a .safetensors file, a folder with one, a pickle that loads with weights_only=True, or a state dict; by
            PEFT, diffusers, kohya or the model's authors. Or a model with PEFT's adapters, of which one is active.
        name: of the adapter, for set_adapters, swap and detach.
        scale: multiplies what the LoRA adds.
        alpha: of every layer, whatever the source states.
        strict: raise where anything in the file cannot be attached. False attaches the pairs that fit; the report lists
            the rest. Keys for another component are no error unless there are no others.
        capacity: the rank that the adapter has room for in every layer, so that swap can bring others; None: its own.
        keep_weight: see LoRALinear.from_linear; for layers that are not attached yet.
        fuse: give diffusers' attention blocks a processor that runs q, k and v (in cross-attention k and v) as one.

    Raises:
        ValueError, TypeError, FileNotFoundError: for a file that cannot be read or does not fit the module, a name that
            is attached already, and layers that cannot have adapters. RuntimeError: while layers are merged, and for a
            module that holds layers which detach took from another. The module is unchanged then.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3))
        >>> attach(net, {"0.lora_A.weight": torch.ones(1, 2), "0.lora_B.weight": torch.ones(3, 1)}, scale=0.5)
        Report(matched=('0',), unmatched=(), elsewhere=(), reasons={}, scales={'no alpha stated': ('0',)})
        >>> detach(net)
        >>> net
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
        )
    """
    check_capacity(capacity)
    finite("scale", scale)
    before = frozen_of(layers_of(module).values())
    resolution = _resolve(module, source, strict, alpha)
    entries, report = resolution.entries, report_of(resolution)
    if not entries:
        return report
    _check_new(name, entries, before, capacity)
    touched = {path: module.get_submodule(path) for path in entries}
    attention.check_called(module, touched.values())
    moving = moving_in(module)
    blocks = attention.fusible(module, touched.values(), moving) if fuse else {}
    new = modules_to_replace(module, touched, blocks, keep_weight)
    with all_or_nothing(before), replacements(new, blocks, keep_weight, moving) as adapted:
        after = [*before, *frozen_of(adapted.layers.values())]
        layers = {path: adapted.layers.get(old, old) for path, old in touched.items()}
        active, added = {**active_of(before), name: 1.0}, _pairs_of(layers, entries, scale)
        for frozen in after:
            if frozen in added:
                frozen.add(name, *added[frozen], capacity=capacity, active=active)
            else:
                frozen.activate(active)
    for frozen in added:
        frozen.names_by_attach.add(name)
    for frozen in after:
        frozen.made_by_attach |= frozen not in before
        frozen.index = before[0].index if before else None
    put(module, adapted.layers)
    attention.install(adapted.projections)
    return report


def set_adapters(module: nn.Module, weights: Mapping[str, float]) -> None:
    """Makes exactly the named adapters active, each times its weight, in the order of the mapping.

    No call of the module may run meanwhile: some of its layers would use the old adapters and some the new.

    Raises:
        ValueError, TypeError: for names that are not attached, weights that are not finite, and another order while a
            set_adapter_index counts the present one. RuntimeError: while layers are merged. Nothing has changed then.
    """
    all_frozen = frozen_of(layers_of(module).values())
    check_weights(weights, names_of(all_frozen))
    for frozen in all_frozen:
        frozen.check_order(weights)
    with all_or_nothing(all_frozen):
        for frozen in all_frozen:
            frozen.activate(weights)


def set_adapter_index(module: nn.Module, index: Tensor | None) -> None:
    """Gives each sample of a batch an adapter of its own, until called again.

    Args:
        module: with attached adapters.
        index: int64 (B,), the place of each sample's adapter among the active ones (set_adapters' order), -1 none. B is
            the first axis of what the layers read: under guidance cat([index, index]). None: the sum of all for every
            sample.

    Raises:
        ValueError, TypeError: for an index of another kind, or out of range. A length other than the batch's raises at
            the call.
    """
    all_frozen = frozen_of(layers_of(module).values())
    if index is not None:
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 1:
            what = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index must be an int64 tensor with one axis, got {what}")
        active = active_of(all_frozen)
        if not ((index >= -1) & (index < len(active))).all():
            places = ", ".join(f"{i} ({name})" for i, name in enumerate(active)) or "no adapter"
            raise ValueError(f"index must hold -1 or one of {places}; got {index.tolist()}")
        index = index.clone()
    for frozen in all_frozen:
        frozen.index = index if index is None or frozen.weights_move else index.to(frozen.layers[0].weight.device)


def swap(
    module: nn.Module, source: Source, name: str = "default", scale: float = 1.0, *, alpha: float | None = None
) -> None:
    """Puts another LoRA in an attached one's place, in the same memory: a compiled model goes on without compiling.

    Ranks may be lower than the capacity of attach; attached layers that the source does not name add nothing. No call
    of the module may run meanwhile: some of its layers would use the old adapter and some the new. source, scale and
    alpha are attach's.

    Raises:
        ValueError, TypeError, FileNotFoundError: as attach, for a name that is not attached, a rank above the capacity,
            and a layer that the attached LoRA does not have. RuntimeError: while layers are merged. Nothing has changed
            then.
    """
    finite("scale", scale)
    attached = layers_of(module)
    all_frozen = frozen_of(attached.values())
    check_names([name], names_of(all_frozen))
    entries = _resolve(module, source, strict=True, alpha=alpha).entries
    had = {path for path, layer in attached.items() if slot_of(layer, name)}
    if foreign := [path for path in entries if path not in had]:
        raise ValueError(f"{len(foreign)} layers have no adapter {name!r} to swap: {first_few(foreign)}")
    new = _pairs_of({path: attached[path] for path in entries}, entries, scale)
    with all_or_nothing(all_frozen):
        for frozen in all_frozen:
            if name in frozen.adapters.slots:
                frozen.replace(name, *new.get(frozen, ([None] * len(frozen.layers), 1.0)))


def detach(module: nn.Module, name: str | None = None) -> None:
    """Takes an adapter off, or all of them. A layer without any becomes the original module again, bit for bit.

    A LoRALinear that was in the model before attach stays. It keeps its adapters that attach did not add, unless name
    says one of them.

    A layer that was taken out raises RuntimeError from every method. A call that another thread makes to it meanwhile
    raises too, or still computes with the adapter; a call of the whole module may have some layers with the adapter and
    some without.

    Raises:
        ValueError: for a name that is not attached, or one that a set_adapter_index counts. RuntimeError: for one of
            several adapters while layers are merged. Nothing has changed then.
    """
    layers = layers_of(module, detached=True)
    all_frozen = frozen_of(layers.values())
    if name is not None:
        check_names([name], names_of(all_frozen))
    going = [frozen for frozen in all_frozen if frozen.made_by_attach]
    freed = [frozen for frozen in going if name is None or list(frozen.adapters.slots) == [name]]
    forgotten = {frozen: names for frozen in all_frozen if frozen not in freed and (names := _forgotten(frozen, name))}
    for frozen, names in forgotten.items():
        frozen.check_order([key for key in active_of(all_frozen) if key not in names])
    with all_or_nothing(forgotten):
        for frozen, names in forgotten.items():
            frozen.change(frozen.adapters.without(names))
        release(freed)
    for frozen, names in forgotten.items():
        frozen.names_by_attach -= names
    put(module, {layer: layer.give_back() for layer in layers.values() if layer._frozen in freed})
    attention.uninstall(module, freed)


def state_dict(module: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """An attached adapter as X.lora_A.weight and X.lora_B.weight of each layer X; attach takes it again.

    B is multiplied by scale * alpha / r, so that PEFT, diffusers and kohya's readers, who take alpha = r where none is
    stated, give it the same effect. It is float32 where that would round it in half precision. The weight of
    set_adapters is no part of it.

    Args:
        module: with attached adapters.
        name: the adapter; None where the module has a single one.

    Raises:
        ValueError: for a name that is not attached, or without one where there are several or none.
    """
    layers = layers_of(module)
    names = names_of(frozen_of(layers.values()))
    if name is None and len(names) != 1:
        raise ValueError(f"name must say which adapter: {', '.join(map(repr, names)) or 'none'} attached")
    name = next(iter(names)) if name is None else name
    check_names([name], names)
    state = {}
    for path, layer in layers.items():
        slot = slot_of(layer, name)
        if slot is None or not len(slot.down):
            continue
        stem = unwrapped(path)
        state[f"{stem}.lora_A.weight"] = slot.down.detach()
        state[f"{stem}.lora_B.weight"] = folded(slot.up.detach(), slot.factor)
    return state


def _check_new(name: str, entries: Mapping[str, Entry], before: list[FrozenLayers], capacity: int | None) -> None:
    """Raises where the name is taken, or a rank above the capacity."""
    if name in names_of(before):
        raise ValueError(f"name must be new, {name!r} is attached: swap() or detach() it, or choose another")
    if capacity is not None and (large := [path for path, entry in entries.items() if len(entry.down) > capacity]):
        raise ValueError(f"capacity is {capacity}, the rank is {len(entries[large[0]].down)} in {first_few(large)}")


def _forgotten(frozen: FrozenLayers, name: str | None) -> set[str]:
    """The adapters that a layer forgets but stays: the named one, or all that attach added to this and other layers."""
    slots, active = frozen.adapters.slots, frozen.adapters.active
    if name is not None:
        return {name} & {*slots, *active}
    return frozen.names_by_attach | {other for other in active if other not in slots}


def _resolve(module: nn.Module, source: Source, strict: bool, alpha: float | None) -> Resolution:
    file = read(source, None if alpha is None else finite("alpha", alpha))
    resolution = resolve(module, file.entries, file.left)
    if strict:
        refuse(resolution, file.name, type(module).__name__)
        return resolution
    for path, entry in list(resolution.entries.items()):
        layer = module.get_submodule(path)
        if not isinstance(layer, AdaptedLayer) and (reason := why_not(layer, kind_of(layer), hooked=True)) is not None:
            del resolution.entries[path]
            resolution.unmatched[entry.key] = f"{path} cannot have adapters: {reason}"
    return resolution


def _pairs_of(
    layers: Mapping[str, nn.Module], entries: Mapping[str, Entry], scale: float
) -> dict[FrozenLayers, tuple[list[Pair | None], list[float]]]:
    """The pairs and scales that add and replace take, for all layers that the entries touch."""
    arguments: dict[FrozenLayers, tuple[list[Pair | None], list[float]]] = {}
    for path, layer in layers.items():
        assert isinstance(layer, AdaptedLayer)
        frozen, entry = layer._frozen, entries[path]
        count = len(frozen.layers)
        pairs, scales = arguments.setdefault(frozen, ([None] * count, [1.0] * count))
        pairs[layer._i], scales[layer._i] = (entry.down, entry.up), scale * entry.factor
    return arguments
