"""The modules inside a torch module: behind its wrappers, its only child, all of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def unwrapped_module(module: nn.Module) -> nn.Module:
    """The module that torch.compile, DataParallel and DistributedDataParallel wrap."""
    while True:
        compiled = module._modules.get("_orig_mod")
        # Of DataParallel, DistributedDataParallel and FSDP it is the only child; models of one child have other names.
        inner = compiled if compiled is not None else module._modules.get("module")
        if inner is None or len(module._modules) != 1 or module._parameters:
            return module
        module = inner


def only_children(module: nn.Module) -> Iterator[nn.Module]:
    """The module, and the one it holds where that is all that it holds, and so on."""
    yield module
    while len(module._modules) == 1 and not module._parameters:
        (child,) = module._modules.values()
        if child is None:
            return
        module = child
        yield module


def parts_of(root: nn.Module) -> list[nn.Module]:
    """The root and every module below it, once, in the order of registration."""
    waiting, seen, parts = [root], set(), []
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        parts.append(module)
        if children := module._modules:
            waiting += [child for child in reversed(children.values()) if child is not None]
    return parts
