"""Keeps torch and diffusers from passing adapted layers by, where they would read weights or call other layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fastsample.lora.layers.adapted import AdaptedLayer
from fastsample.lora.layers.attention import fused_parts


def keep_called(module: nn.Module) -> None:
    """Keeps all adapted layers of a tree from being passed by, and lets go where there are none any more.

    What cannot be brought to call them is refused when it is tried.
    """
    unadapted = set[nn.Module]()
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            # torch calls the linears of an encoder layer that has a hook, instead of a kernel on their weights.
            _set_hook(part, _calls_its_linears, _adapted(part.modules()))
        elif isinstance(part, nn.TransformerEncoder):
            # Only the kernel on the weights takes the nested tensors that an encoder makes of padded sequences.
            _set_nested(part, not _adapted(part.modules()))
        else:
            _set_fusing(part)
            unadapted |= _left_out(part)
    for part in module.modules():
        if not isinstance(part, nn.TransformerEncoderLayer):
            _set_hook(part, _leaves_adapters_out, part in unadapted)


def _adapted(modules: Iterable[nn.Module]) -> bool:
    return any(isinstance(module, AdaptedLayer) for module in modules)


def _left_out(block: nn.Module) -> set[nn.Module]:
    """Of a block that diffusers has fused the layers without the adapters that their other half has."""
    layers = set[nn.Module]()
    for name, parts in fused_parts(block).items():
        whole = block._modules[name]
        assert whole is not None
        if _adapted(parts):
            layers.add(whole)
        elif isinstance(whole, AdaptedLayer):
            layers.update(parts)
    return layers


def _set_hook(module: nn.Module, hook: object, wanted: bool) -> None:
    hooks = module._forward_pre_hooks
    mine = [key for key, value in hooks.items() if value is hook]
    if wanted and not mine:
        module.register_forward_pre_hook(hook)  # type: ignore[arg-type]
    for key in () if wanted else mine:
        del hooks[key]


def _set_nested(encoder: nn.TransformerEncoder, wanted: bool) -> None:
    attributes = vars(encoder)
    if not wanted:
        attributes.setdefault("_nested_when_detached", encoder.use_nested_tensor)
        encoder.use_nested_tensor = False
    elif "_nested_when_detached" in attributes:
        encoder.use_nested_tensor = attributes.pop("_nested_when_detached")


def _set_fusing(block: nn.Module) -> None:
    fused = [layer for name in fused_parts(block) if (layer := block._modules[name]) is not None]
    for name, refused in (("fuse_projections", _adapted(block.children())), ("unfuse_projections", _adapted(fused))):
        if refused and callable(getattr(type(block), name, None)):
            vars(block)[name] = _refuse_to_fuse
        elif vars(block).get(name) is _refuse_to_fuse:
            del vars(block)[name]


def _calls_its_linears(*_: object) -> None:
    """A hook of keep_called."""


def _leaves_adapters_out(*_: object) -> None:
    raise RuntimeError(
        "this projection has no adapters, but the layers that diffusers fused into it, or made of it, have: detach() "
        "them, fuse or unfuse the projections, and attach() again"
    )


def _refuse_to_fuse(*_: object, **__: object) -> None:
    raise RuntimeError("fuse_projections and unfuse_projections would leave adapters out: detach() them first")
