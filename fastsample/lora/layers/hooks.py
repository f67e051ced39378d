"""Hooks of accelerate and diffusers, which put a function of their own around a module's forward.

They bring a module's weights to another device or dtype for the time of a call. Neither library is imported here: a
module has such hooks only where its library is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

# The attributes that say that a module has hooks.
HOOK_NAMES = ("_old_forward", "_hf_hook", "_diffusers_hook")
_LIBRARIES = ("accelerate.hooks", "diffusers.hooks.hooks")


def is_hooked(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's own `forward` is `kind`'s, or hooks around that, as both libraries make and leave them."""
    forward = vars(module).get("forward")
    if isinstance(forward, partial) and getattr(forward.func, "__module__", None) in _LIBRARIES:
        return any(_is_own(value, module, kind) for kept in _kept(module) for value in kept.values())
    return _is_own(forward, module, kind)


def moves(module: object) -> bool:
    """Whether hooks around the module's forward may bring its weights elsewhere."""
    attributes = vars(module)
    # accelerate's hook of a model on several devices leaves the weights where they are, and says so.
    return "_diffusers_hook" in attributes or getattr(attributes.get("_hf_hook"), "offload", "_hf_hook" in attributes)


def moved_together(root: nn.Module) -> set[nn.Module]:
    """The modules whose weights diffusers' group offloading moves, with those of others or alone."""
    groups = [group for part in root.modules() for group in _groups(part)]
    loose = {id(parameter) for group in groups for parameter in group.parameters}
    together = {member for group in groups for block in group.modules for member in block.modules()}
    return together | {part for part in root.modules() if any(id(p) in loose for p in part._parameters.values())}


def hand_over(old: nn.Module, new: nn.Module) -> None:
    """Lets everything among the attributes, which both modules share, that means the old module mean the new one.

    These are its bound methods, such as the forward that hooks call, and what hooks know of their module.
    """
    for kept in _kept(new):
        kept.update({name: _for(value, old, new) for name, value in kept.items()})
    # What compile() made calls the old module.
    vars(new).pop("_compiled_call_impl", None)


def hand_over_groups(root: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Lets diffusers' group offloading move the new modules in the place of the old ones."""
    for part in root.modules():
        for group in _groups(part):
            group.modules = [replacements.get(member, member) for member in group.modules]
            for leader in ("offload_leader", "onload_leader"):
                member = getattr(group, leader, None)
                setattr(group, leader, member and replacements.get(member, member))


def _kept(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Where a module and its hooks keep functions that they call."""
    yield vars(module)
    registry = vars(module).get("_diffusers_hook")
    if registry is not None:
        yield vars(registry)
        for functions in getattr(registry, "_fn_refs", ()):
            yield vars(functions)


def _groups(module: nn.Module) -> Iterator[Any]:
    hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
    yield from (hook.group for hook in hooks.values() if hasattr(getattr(hook, "group", None), "onload_leader"))


def _is_own(value: Any, module: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is kind.forward


def _for(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """A value with the new module in the old one's place, where it is that module or bound to it."""
    if value is old:
        return new
    if isinstance(value, MethodType) and value.__self__ is old:
        name = getattr(value.__func__, "__name__", "")
        own = getattr(type(old), name, None) is value.__func__
        return MethodType(getattr(type(new), name) if own else value.__func__, new)
    if isinstance(value, partial) and any(argument is old for argument in value.args):
        bound = partial(
            value.func, *(new if argument is old else argument for argument in value.args), **value.keywords
        )
        bound.__dict__.update({name: _for(kept, old, new) for name, kept in vars(value).items()})
        return bound
    return value
