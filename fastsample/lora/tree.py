"""A module tree's adapted layers: finding them, putting them in place, checking what concerns all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from fastsample.lora.adapters import Adapters
from fastsample.lora.layers import AdaptedLayer


def layers_of(module: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers by name."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch module, got {type(module).__name__}")
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, AdaptedLayer)}


def banks_of(layers: Iterable[AdaptedLayer]) -> list[Adapters]:
    return list(dict.fromkeys(layer._bank for layer in layers))


def names_of(banks: Iterable[Adapters]) -> dict[str, None]:
    """The adapters of a tree, of which a layer may have some."""
    return dict.fromkeys(name for bank in banks for name in bank.parts)


def active_of(banks: Iterable[Adapters]) -> dict[str, float]:
    """The active adapters of a tree, in the order that an adapter index counts."""
    active: dict[str, float] = {}
    for bank in banks:
        active = {**bank.active, **active}
    return active


def put(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces submodules wherever the tree holds them."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    _keep_called(module)


def check_order(banks: Iterable[Adapters], names: Iterable[str]) -> None:
    """Raises where other active adapters would give a per-sample choice another meaning."""
    new = list(names)
    for bank in banks:
        if bank.index is not None and new[: len(bank.active)] != list(bank.active):
            raise ValueError(
                f"an adapter_index is set and counts the active adapters {', '.join(bank.active)}, which would become "
                f"{', '.join(new) or 'none'}: call set_adapter_index(module, None) first"
            )


@contextmanager
def all_or_nothing(banks: Iterable[Adapters]) -> Iterator[None]:
    """Takes back what happened to the adapters inside if something raises."""
    before = [(bank, bank.parts, bank.active) for bank in banks]
    for bank, *_ in before:
        bank.check_not_merged()
    try:
        yield
    except BaseException:
        for bank, parts, active in before:
            bank.change(parts, active)
        raise


def _keep_called(module: nn.Module) -> None:
    """Makes torch's encoder layers call their adapted linears: one with a hook is not left to the kernel that reads
    the weights alone."""
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            hooks = layer._forward_pre_hooks
            mine = [key for key, hook in hooks.items() if hook is _calls_its_linears]
            adapted = any(isinstance(part, AdaptedLayer) for part in layer.modules())
            if adapted and not mine:
                layer.register_forward_pre_hook(_calls_its_linears)
            for key in () if adapted else mine:
                del hooks[key]


def _calls_its_linears(*_: object) -> None:
    """The hook of _keep_called."""
