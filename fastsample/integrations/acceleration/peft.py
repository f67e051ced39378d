"""What PEFT's layers in a network hold, and which of them can be moved."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastsample.lora.layers.adapted import why_not
from fastsample.lora.layers.attention import _hooked
from fastsample.lora.layers.conv import kind_of
from fastsample.lora.layers.slots import Pair

_PLAIN = ("Linear", "Conv1d", "Conv2d", "Conv3d")
_LARGEST = torch.finfo(torch.float32).max
# How far apart the weights of layers may be that one number has given, in parts of it.
_ROUNDING = 1e-9


def peft_layers(module: nn.Module) -> dict[str, Any]:
    """The layers that PEFT has put into a network, by path."""
    # A network can only hold them where PEFT is imported.
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return {}
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, tuners.BaseTunerLayer)}


def is_wrapped(module: nn.Module) -> bool:
    """Whether a network is a PeftModel, whose own methods change the layers that it knows."""
    models: Any = sys.modules.get("peft.peft_model")
    return models is not None and isinstance(module, models.PeftModel)


def why_left(layer: Any) -> str | None:
    """Why a layer of PEFT cannot be moved; None where it can."""
    kinds: Any = sys.modules.get("peft.tuners.lora.layer")
    if kinds is None or type(layer) not in [getattr(kinds, name, None) for name in _PLAIN]:
        return f"{type(layer).__module__}.{type(layer).__qualname__} is none of PEFT's plain LoRA layers"
    if layer.merged:
        return "the LoRA is fused into the weights, unfuse_lora() takes it out"
    if _hooked(layer):
        return "hooks stand around PEFT's layers"
    for name in layer.lora_A:
        if (reason := _why_adapter_left(layer, name)) is not None:
            return f"adapter {name!r} {reason}"
    base = layer.base_layer
    if (reason := why_not(base, kind_of(base))) is not None:
        return f"adapters need plain linears and convolutions: {reason}"
    return None


def _why_adapter_left(layer: Any, name: str) -> str | None:
    variant, dropout = getattr(layer, "lora_variant", {}).get(name), layer.lora_dropout[name]
    if variant is not None or layer.use_dora.get(name):
        return f"is more than A and B: {'DoRA' if variant is None else type(variant).__name__}"
    if layer.lora_B[name].bias is not None:
        return "has a bias"
    if getattr(layer, "fan_in_fan_out", False):
        return "is for transposed weights"
    if dropout.training and getattr(dropout, "p", 0.0) > 0:
        return "is in training, with dropout"
    if not abs(float(layer.scaling[name])) <= _LARGEST:
        return f"has the scale {float(layer.scaling[name])}"
    if len({half.weight.device for half in (layer.lora_A[name], layer.lora_B[name], layer.base_layer)}) > 1:
        return "is on another device than the weights"
    return None


def active_in(layer: Any) -> list[str]:
    """The adapters that a layer adds."""
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]


def weights_of(layers: Iterable[Any]) -> dict[str, float | None]:
    """What set_adapters has multiplied each adapter by, None where layers differ or it cannot be told."""
    found: dict[str, list[float | None]] = {}
    for layer in layers:
        for name in layer.lora_A:
            stated = _stated(layer, name)
            found.setdefault(name, []).append(float(layer.scaling[name]) / stated if stated else None)
    return {name: _common(weights) for name, weights in found.items()}


def _common(weights: list[float | None]) -> float | None:
    first = weights[0]
    if first is None or any(w is None or abs(w - first) > _ROUNDING * abs(first) for w in weights):
        return None
    return first


def pair_of(layer: Any, name: str, weights: Mapping[str, float | None]) -> tuple[Pair, float]:
    """A and B of an adapter, and what they are multiplied by beside the adapter's weight."""
    factor = float(layer.scaling[name]) if weights[name] is None else _stated(layer, name)
    # As constants: PEFT's parameters want gradients, for which fused kernels have no time.
    return (layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()), factor


def _stated(layer: Any, name: str) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    rank = layer.r[name]
    return float(layer.lora_alpha[name]) / (math.sqrt(rank) if layer.use_rslora.get(name) else rank)
