"""Modules that public names have left: pickles name the module of a class, or of a function, as it was then."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# Earlier module: the names that it had, and where each is now.
_EARLIER: dict[str, dict[str, str]] = {
    "fastsample.levels": {"karras_sigmas": "fastsample.times.continuous", "flow_levels": "fastsample.times.flow"},
    "fastsample.timesteps": {"spaced_timesteps": "fastsample.times.timesteps"},
    "fastsample.samplers.guidance": {"Shared": "fastsample.loop.guidance"},
    "fastsample.samplers.run": {"Step": "fastsample.loop.options", "Options": "fastsample.loop.options"},
    "fastsample.samplers.prepared": {"Prepared": "fastsample.loop.prepared"},
    "fastsample.ops.lora_pack": {
        "LowRank": "fastsample.ops.lora.adapters",
        "PackedAdapters": "fastsample.ops.lora.adapters",
        "PackedLinear": "fastsample.ops.lora.weights",
    },
    "fastsample.lora.attention": {"FusedAttnProcessor": "fastsample.lora.layers.attention"},
    "fastsample.lora.conv": {
        "LoRAConv2d": "fastsample.lora.layers.conv",
        "ConvAdapters": "fastsample.lora.layers.conv:FrozenConv",
    },
    "fastsample.lora.factors": {"Part": "fastsample.lora.layers.slots:Slot"},
    "fastsample.lora.frozen": {"FrozenLinears": "fastsample.lora.layers.frozen_linears"},
}


class _Earlier(ModuleType):
    """Imports what is asked for from where it is now."""

    def __getattr__(self, name: str) -> Any:
        place = _EARLIER[self.__name__].get(name)
        if place is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, _, renamed = place.partition(":")
        return getattr(import_module(module), renamed or name)


def find_by_earlier_names() -> None:
    """Lets `import` and pickle find these modules."""
    for name in _EARLIER:
        sys.modules.setdefault(name, _Earlier(name))
