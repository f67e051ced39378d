"""A module tree's adapted layers: finding them, putting them in place, checking what concerns all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from fastsample.lora.layers.adapters import Adapters
from fastsample.lora.layers.linear import AdaptedLayer, check_replaceable


def layers_of(module: nn.Module, detached: bool = False) -> dict[str, AdaptedLayer]:
    """The adapted layers by name; RuntimeError, unless they are asked for, where some were detached elsewhere."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch module, got {type(module).__name__}")
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, AdaptedLayer)}
    for bank in () if detached else banks_of(layers.values()):
        bank.check_attached()
    return layers


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


def replaceable(
    module: nn.Module,
    touched: Mapping[str, nn.Module],
    blocks: Mapping[nn.Module, list[nn.Linear]],
    keep_weight: bool,
) -> list[nn.Module]:
    """The modules that adapted layers will replace, once it is known that they can."""
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
    """Keeps torch and diffusers from reading the weights of adapted linears instead of calling them."""
    for part in module.modules():
        own = vars(part)
        if isinstance(part, nn.TransformerEncoderLayer):
            # One with a hook is not left to the kernel that reads the weights alone.
            hooks = part._forward_pre_hooks
            mine = [key for key, hook in hooks.items() if hook is _calls_its_linears]
            if _adapted(part) and not mine:
                part.register_forward_pre_hook(_calls_its_linears)
            for key in () if _adapted(part) else mine:
                del hooks[key]
        elif isinstance(part, nn.TransformerEncoder):
            # Only that kernel takes the nested tensors that an encoder makes of padded sequences.
            if _adapted(part):
                own.setdefault("_nested_when_detached", part.use_nested_tensor)
                part.use_nested_tensor = False
            elif "_nested_when_detached" in own:
                part.use_nested_tensor = own.pop("_nested_when_detached")
        elif callable(getattr(type(part), "fuse_projections", None)):
            if any(isinstance(child, AdaptedLayer) for child in part.children()):
                own["fuse_projections"] = _refuse_to_fuse
            elif own.get("fuse_projections") is _refuse_to_fuse:
                del own["fuse_projections"]


def _adapted(module: nn.Module) -> bool:
    return any(isinstance(part, AdaptedLayer) for part in module.modules())


def _calls_its_linears(*_: object) -> None:
    """The hook of _keep_called."""


def _refuse_to_fuse(*_: object, **__: object) -> None:
    raise RuntimeError("fuse_projections would leave the adapters out: detach() them first")
