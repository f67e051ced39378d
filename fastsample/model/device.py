"""Where a model computes."""

from __future__ import annotations

import torch
from torch import nn

from fastsample.model.hooks import diffusers_hook


def device_of(parts: list[nn.Module], hooked: list[nn.Module]) -> torch.device | None:
    """Where a hook brings the first of these modules that has one, else where the first parameter lies, or buffer."""
    for part in hooked:
        if (brought := _offloaded_to(part)) is not None:
            return brought
    for kind in ("_parameters", "_buffers"):
        for part in parts:
            for value in getattr(part, kind).values():
                if value is not None and value.device.type != "meta":
                    return value.device
    return None


def _offloaded_to(module: nn.Module) -> torch.device | None:
    """Where a hook takes the module's weights, or its input, before it computes."""
    if (hook := module.__dict__.get("_hf_hook")) is not None:
        for single in (hook, *getattr(hook, "hooks", ())):
            device = getattr(single, "execution_device", None)
            if device is not None and torch.device(device).type != "meta":
                return torch.device(device)
    grouped = diffusers_hook(module, "group_offloading")
    return None if grouped is None else getattr(getattr(grouped, "config", None), "onload_device", None)
