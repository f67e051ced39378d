"""LoRA: adapters on linears and convolutions, alone or attached to a whole model from a file.

An adapter has a name and changes some layers of a model by factors A and B. It has three forms in a layer:

- an `Entry` is what a file holds, with the file's names and alpha (files/formats.py);
- a `Slot` is what the layer keeps, with the rank that there is room for (layers/slots.py);
- a `LowRank` is what the product takes, rounded to the weight's dtype and scaled (ops/lora/adapters.py).

Layers that read one input have an `AdapterSet` in common. `FrozenLayers` are such layers, their packed weights and
their adapters.
"""

from fastsample.lora.attach import attach, detach, set_adapter_index, set_adapters, state_dict, swap
from fastsample.lora.layers.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from fastsample.lora.layers.linear import LoRALinear, QKVProjection
from fastsample.lora.report import Report
from fastsample.lora.saving import save
from fastsample.lora.trainable import Trainable

__all__ = [
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRALinear",
    "QKVProjection",
    "Report",
    "Trainable",
    "attach",
    "detach",
    "save",
    "set_adapter_index",
    "set_adapters",
    "state_dict",
    "swap",
]
