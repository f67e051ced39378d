"""The warning about a model that would disturb its samples, since it is in training mode."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from torch import nn

from fastsample.caller import warn
from fastsample.model.modules import parts_of

_MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)  # behave otherwise in training
# By id: models may define equality. What is gone leaves the dict, so that a new model of the same id is new.
_warned_of_training: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def warn_of_training(modules: Iterable[nn.Module]) -> None:
    """Warns once of every module that is in training mode, or holds a dropout or batch norm that is."""
    for module in modules:
        if _warned_of_training.get(id(module)) is module or (culprit := _in_training(module)) is None:
            continue
        _warned_of_training[id(module)] = module
        name = type(module).__name__
        what = "is in training mode" if culprit is module else f"has a {type(culprit).__name__} in training mode"
        warn(f"{name} {what}: dropout and batch statistics would disturb the samples; call .eval() on it first")


def modal_parts(modules: Sequence[nn.Module]) -> tuple[weakref.ref[nn.Module], ...]:
    """The modules, and what is in them now that behaves otherwise in training: while none of these is, none warns."""
    parts = [part for module in modules for part in parts_of(module) if isinstance(part, _MODAL)]
    return tuple(map(weakref.ref, [*modules, *parts]))


def _in_training(module: nn.Module) -> nn.Module | None:
    """The module itself where it is in training mode, else the first one in it that is and behaves otherwise then.

    One without parameters, such as a bare activation, has nothing to train: its mode was left as it is made.
    """
    parts = parts_of(module)
    if module.training and any(value is not None for part in parts for value in part._parameters.values()):
        return module
    for part in parts:
        if part.training and isinstance(part, _MODAL):
            return part
    return None
