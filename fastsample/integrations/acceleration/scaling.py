"""diffusers' keyword `cross_attention_kwargs={"scale": s}`, which reaches PEFT's layers alone, on moved adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastsample.checks import real
from fastsample.lora.layers.adapter_set import AdapterSet
from fastsample.lora.layers.frozen import FrozenLayers
from fastsample.lora.tree import all_or_nothing, frozen_of, layers_of
from fastsample.ops.lora.adapters import LowRank

_KEYWORDS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


class ScaledAdapters(AdapterSet):
    """Adapters times a call's scale. What is made of it, such as by set_adapters, has none."""

    def __init__(self, adapters: AdapterSet, scale: float) -> None:
        super().__init__(adapters.layers, adapters.slots, adapters.active)
        self.scale = scale

    def groups(self, per_sample: bool) -> list[list[LowRank | None]]:
        return [
            [low_rank and low_rank._replace(scale=low_rank.scale * self.scale) for low_rank in group]
            for group in super().groups(per_sample)
        ]


class ScaleHook:
    """Runs before each call of a network and gives its adapters the call's scale.

    They keep it until a call has another one, since to pack them anew takes longer than to compare.

    Attributes:
        layers: those whose scale is looked at: all that accelerate has made.
    """

    def __init__(self, layers: Sequence[FrozenLayers]) -> None:
        self.layers = layers

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        scale = next((kwargs[name].get("scale", 1.0) for name in _KEYWORDS if kwargs.get(name)), 1.0)
        if all(_scale_of(frozen) == scale for frozen in self.layers):
            return
        if torch.compiler.is_compiling():
            torch.compiler.disable(_multiply)(module, scale)
        else:
            _multiply(module, scale)


def _multiply(module: nn.Module, scale: object) -> None:
    factor = real("the keyword scale", scale)
    all_frozen = frozen_of(layers_of(module).values())
    with all_or_nothing(all_frozen):
        for frozen in all_frozen:
            adapters = frozen.adapters
            plain = AdapterSet(adapters.layers, adapters.slots, adapters.active)
            frozen.change(plain if factor == 1 else ScaledAdapters(adapters, factor))


def _scale_of(frozen: FrozenLayers) -> float:
    return getattr(frozen.adapters, "scale", 1.0)


def follow_scale(module: nn.Module, layers: Sequence[FrozenLayers]) -> None:
    """Lets the adapters of a network follow the keyword."""
    module.register_forward_pre_hook(ScaleHook(layers), with_kwargs=True)


def unfollow_scale(module: nn.Module) -> None:
    """Takes that back."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, ScaleHook)]:
        del hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
