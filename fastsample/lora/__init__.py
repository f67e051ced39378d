"""LoRA: adapters on linears and convolutions, alone or attached to a whole model from a file."""

from fastsample.lora.attach import Report, attach, detach, set_adapter_index, set_adapters, state_dict, swap
from fastsample.lora.layers.conv import LoRAConv2d
from fastsample.lora.layers.linear import LoRALinear, QKVProjection

__all__ = [
    "LoRAConv2d",
    "LoRALinear",
    "QKVProjection",
    "Report",
    "attach",
    "detach",
    "set_adapter_index",
    "set_adapters",
    "state_dict",
    "swap",
]
