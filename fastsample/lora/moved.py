"""Modules that classes have left: pickles of whole models name the modules of their classes as they were then."""

from __future__ import annotations

import sys
from types import ModuleType

from fastsample.lora import layers
from fastsample.lora.layers.attention import FusedAttnProcessor
from fastsample.lora.layers.conv import FrozenConv, LoRAConv2d
from fastsample.lora.layers.frozen_linears import FrozenLinears
from fastsample.lora.layers.linear import LoRALinear, QKVProjection
from fastsample.lora.layers.slots import Slot
from fastsample.ops.lora.adapters import LowRank, PackedAdapters
from fastsample.ops.lora.weights import PackedLinear

_EARLIER: dict[str, dict[str, type]] = {
    "fastsample.lora.attention": {"FusedAttnProcessor": FusedAttnProcessor},
    "fastsample.lora.conv": {"LoRAConv2d": LoRAConv2d, "ConvAdapters": FrozenConv},
    "fastsample.lora.factors": {"Part": Slot},
    "fastsample.lora.frozen": {"FrozenLinears": FrozenLinears},
    "fastsample.ops.lora_pack": {
        "LowRank": LowRank,
        "PackedAdapters": PackedAdapters,
        "PackedLinear": PackedLinear,
    },
}


def find_by_earlier_names() -> None:
    """Lets pickle import the classes from the modules that they have left."""
    vars(layers).update(LoRALinear=LoRALinear, QKVProjection=QKVProjection)
    for name, classes in _EARLIER.items():
        module = ModuleType(name)
        vars(module).update(classes)
        sys.modules.setdefault(name, module)
