"""Layers with frozen weights and adapters beside them."""

from fastsample.lora.layers.linear import LoRALinear, QKVProjection

__all__ = ["LoRALinear", "QKVProjection"]
