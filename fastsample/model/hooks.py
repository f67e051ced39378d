"""What accelerate and diffusers leave at a module, to cast or move its weights before it computes."""

from __future__ import annotations

from typing import Any

from torch import nn


def hooked(parts: list[nn.Module]) -> list[nn.Module]:
    """Those of the modules that hold a hook of accelerate or of diffusers."""
    return [part for part in parts if "_hf_hook" in part.__dict__ or "_diffusers_hook" in part.__dict__]


def diffusers_hook(module: nn.Module, name: str) -> Any:
    """The hook of this name that diffusers has registered, else None."""
    registry = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.get_hook(name)
