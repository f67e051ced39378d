"""A LoRA file on a whole model: the layers it touches, several at once, others in their place, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsample.lora.files.formats import read
from fastsample.lora.files.names import Factors, Resolution, resolve
from fastsample.lora.files.refused import first
from fastsample.lora.layers import attention
from fastsample.lora.layers.adapters import Adapters, check_names, check_weights, finite
from fastsample.lora.layers.conv import LoRAConv2d
from fastsample.lora.layers.factors import Pair
from fastsample.lora.layers.frozen import release
from fastsample.lora.layers.linear import AdaptedLayer, LoRALinear, QKVProjection, check_capacity
from fastsample.lora.tree import active_of, all_or_nothing, banks_of, layers_of, names_of, put, replaceable

Source = str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Report:
    """What attach made of a file.

    Attributes:
        matched: names of the submodules that got an adapter.
        unmatched: keys of the file that name no submodule.
        elsewhere: keys of the file for other components, such as a text encoder's where the module is a UNet.
    """

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    elsewhere: tuple[str, ...]


def attach(
    module: nn.Module,
    source: Source,
    name: str = "default",
    scale: float = 1.0,
    *,
    strict: bool = True,
    capacity: int | None = None,
    keep_weight: bool = True,
    fuse: bool = True,
) -> Report:
    """Adds a LoRA to every layer of a model that it names, active at once with weight 1.

    Linears become LoRALinears, convolutions LoRAConv2ds, in place; the model's state_dict() keeps its keys and values.
    Each weight acts as W + scale * alpha / r * B A, alpha = r where the file gives none, A and B rounded to W's dtype.
    W is frozen: gradients reach x, A and B alone.

    Args:
        module: a diffusers UNet or transformer, a text encoder, or any other torch module.
        source: a .safetensors file, a folder with one, a pickle that loads with weights_only=True, or a state dict; by
            PEFT, diffusers or kohya.
        name: of the adapter, for set_adapters, swap and detach.
        scale: multiplies what the LoRA adds.
        strict: raise where the file has keys that name no submodule. Keys for another component are no error
            unless there are no others.
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
        Report(matched=('0',), unmatched=(), elsewhere=())
        >>> detach(net)
        >>> net
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
        )
    """
    check_capacity(capacity)
    finite("scale", scale)
    before = banks_of(layers_of(module).values())
    resolution = _resolve(module, source, strict)
    factors = resolution.factors
    report = Report(tuple(factors), tuple(resolution.unmatched), tuple(resolution.elsewhere))
    if not factors:
        return report
    if name in names_of(before):
        raise ValueError(f"name must be new, {name!r} is attached: swap() or detach() it, or choose another")
    if capacity is not None and (large := [path for path, own in factors.items() if len(own.down) > capacity]):
        raise ValueError(f"capacity is {capacity}, the rank is {len(factors[large[0]].down)} in {first(large)}")
    touched = {path: module.get_submodule(path) for path in factors}
    blocks = attention.fusible(module, touched.values()) if fuse else {}
    new = replaceable(module, touched, blocks, keep_weight)
    made: dict[nn.Module, AdaptedLayer] = {}
    projections: dict[nn.Module, QKVProjection] = {}
    with all_or_nothing(before):
        try:
            for block, linears in blocks.items():
                projections[block] = QKVProjection.from_linears(linears, keep_weight=keep_weight)
                made.update((linear, projections[block].linear(i)) for i, linear in enumerate(linears))
            for old in new:
                if isinstance(old, nn.Conv2d):
                    made[old] = LoRAConv2d.from_conv(old)
                elif isinstance(old, nn.Linear) and old not in made:
                    made[old] = LoRALinear.from_linear(old, keep_weight=keep_weight)
            after = [*before, *banks_of(made.values())]
            layers = {path: made.get(old, old) for path, old in touched.items()}
            active, own = {**active_of(before), name: 1.0}, _by_bank(layers, factors, scale)
            for bank in after:
                if bank in own:
                    bank.add(name, *own[bank], capacity=capacity, active=active)
                else:
                    bank.activate(active)
        except BaseException:
            release(banks_of(made.values()))
            raise
    for bank in own:
        bank.names_by_attach.add(name)
    for bank in after:
        bank.made_by_attach |= bank not in before
        bank.index = before[0].index if before else None
    put(module, made)
    attention.install(projections)
    return report


def set_adapters(module: nn.Module, weights: Mapping[str, float]) -> None:
    """Makes these of the attached adapters the active ones, each times its weight, in this order.

    No call of the module may run meanwhile: it would see some layers before and some after.

    Raises:
        ValueError, TypeError: for names that are not attached, weights that are not finite, and another order while a
            set_adapter_index counts the present one. RuntimeError: while layers are merged. Nothing has changed then.
    """
    banks = banks_of(layers_of(module).values())
    check_weights(weights, names_of(banks))
    for bank in banks:
        bank.check_order(weights)
    with all_or_nothing(banks):
        for bank in banks:
            bank.activate(weights)


def set_adapter_index(module: nn.Module, index: Tensor | None) -> None:
    """Gives each sample of a batch an adapter of its own, until called again.

    Args:
        module: with attached adapters.
        index: int64 (B,), the place of each sample's adapter among the active ones (set_adapters' order), -1 none. B is
            the first axis of what the layers read: under guidance cat([index, index]). None: the sum of all for every
            sample.

    Raises:
        ValueError, TypeError: for an index that cannot be one. A length other than the batch's raises at the call.
    """
    banks = banks_of(layers_of(module).values())
    if index is not None:
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 1:
            what = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index must be an int64 tensor with one axis, got {what}")
        active = active_of(banks)
        if not ((index >= -1) & (index < len(active))).all():
            places = ", ".join(f"{i} ({name})" for i, name in enumerate(active)) or "no adapter"
            raise ValueError(f"index must hold -1 or one of {places}; got {index.tolist()}")
        index = index.clone()
    for bank in banks:
        bank.index = None if index is None else index.to(bank.layers[0].weight.device)


def swap(module: nn.Module, source: Source, name: str = "default", scale: float = 1.0) -> None:
    """Puts another LoRA in an attached one's place, in the same memory: a compiled model goes on without compiling.

    Ranks may be lower than the capacity of attach; attached layers that the source does not name add nothing. No call
    of the module may run meanwhile: it would see some layers before and some after.

    Raises:
        ValueError, TypeError, FileNotFoundError: as attach, for a name that is not attached, a rank above the capacity,
            and a layer that the attached LoRA does not have. RuntimeError: while layers are merged. Nothing has changed
            then.
    """
    finite("scale", scale)
    attached = layers_of(module)
    banks = banks_of(attached.values())
    check_names([name], names_of(banks))
    factors = _resolve(module, source, strict=True).factors
    had = {path for path, layer in attached.items() if name in layer._bank.parts and layer._bank.parts[name][layer._i]}
    if foreign := [path for path in factors if path not in had]:
        raise ValueError(f"{len(foreign)} layers have no adapter {name!r} to swap: {first(foreign)}")
    own = _by_bank({path: attached[path] for path in factors}, factors, scale)
    with all_or_nothing(banks):
        for bank in banks:
            if name in bank.parts:
                bank.replace(name, *own.get(bank, ([None] * len(bank.layers), 1.0)))


def detach(module: nn.Module, name: str | None = None) -> None:
    """Takes an adapter off, or all of them. A layer without any becomes the original module again, bit for bit.

    Layers that attach found, a LoRALinear of your own, stay, and keep the adapters that attach did not add unless one
    is named. Whoever still holds a layer that went gets a RuntimeError from all it does, and so does a call of one that
    another thread makes meanwhile, unless it still computes with the adapter; a call of the whole module may have some
    layers with the adapter and some without.

    Raises:
        ValueError: for a name that is not attached, or one that a set_adapter_index counts. RuntimeError: for one of
            several adapters while layers are merged. Nothing has changed then.
    """
    layers = layers_of(module, detached=True)
    banks = banks_of(layers.values())
    if name is not None:
        check_names([name], names_of(banks))
    freed = [bank for bank in banks if bank.made_by_attach and (name is None or list(bank.parts) == [name])]
    gone = {bank: names for bank in banks if bank not in freed and (names := _gone(bank, name))}
    for bank, names in gone.items():
        bank.check_order([key for key in active_of(banks) if key not in names])
    with all_or_nothing(gone):
        for bank, names in gone.items():
            bank.forget(names)
        release(freed)
    for bank, names in gone.items():
        bank.names_by_attach -= names
    put(module, {layer: layer.give_back() for layer in layers.values() if layer._bank in freed})
    attention.uninstall(module, freed)


def state_dict(module: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """An attached adapter as X.lora_A.weight, X.lora_B.weight and X.alpha of each layer X; attach takes it again.

    scale of attach is part of alpha, the weight of set_adapters is not.

    Args:
        module: with attached adapters.
        name: which; None where there is one.

    Raises:
        ValueError: for a name that is not attached, or without one where there are several or none.
    """
    layers = layers_of(module)
    names = names_of(banks_of(layers.values()))
    if name is None and len(names) != 1:
        raise ValueError(f"name must say which adapter: {', '.join(map(repr, names)) or 'none'} attached")
    name = next(iter(names)) if name is None else name
    check_names([name], names)
    state = {}
    for path, layer in layers.items():
        part = layer._bank.parts[name][layer._i] if name in layer._bank.parts else None
        if part is None or not len(part.down):
            continue
        stem, rank = path.replace("_orig_mod.", ""), len(part.down)
        # Files give an alpha of 0 the meaning of none.
        silent = part.factor == 0
        state[f"{stem}.lora_A.weight"] = part.down.detach()
        state[f"{stem}.lora_B.weight"] = torch.zeros_like(part.up) if silent else part.up.detach()
        alpha = float(rank) if silent else part.factor * rank
        state[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float64, device="cpu")
    return state


def _gone(bank: Adapters, name: str | None) -> set[str]:
    """What a layer that stays forgets: the name, or all that attach brought, adapters of its and of other layers."""
    if name is not None:
        return {name} & {*bank.parts, *bank.active}
    return bank.names_by_attach | {own for own in bank.active if own not in bank.parts}


def _resolve(module: nn.Module, source: Source, strict: bool) -> Resolution:
    resolution = resolve(module, read(source))
    if strict and resolution.unmatched:
        raise ValueError(
            f"{len(resolution.unmatched)} keys name no submodule of this {type(module).__name__}; strict=False leaves "
            f"them out: {', '.join(resolution.unmatched)}"
        )
    return resolution


def _by_bank(
    layers: Mapping[str, nn.Module], factors: Mapping[str, Factors], scale: float
) -> dict[Adapters, tuple[list[Pair | None], list[float]]]:
    """What add and replace take, for each bank that the factors touch."""
    found: dict[Adapters, tuple[list[Pair | None], list[float]]] = {}
    for path, layer in layers.items():
        assert isinstance(layer, AdaptedLayer)
        bank, own = layer._bank, factors[path]
        pairs, scales = found.setdefault(bank, ([None] * len(bank.layers), [1.0] * len(bank.layers)))
        pairs[layer._i], scales[layer._i] = (own.down, own.up), scale * own.factor
    return found
