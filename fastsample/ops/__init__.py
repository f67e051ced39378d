"""The ops: public functions, each beside its plain-torch reference."""

from fastsample.ops.likelihood import likelihood, prior_bits
from fastsample.ops.lora import lora_linear
from fastsample.ops.lora.adapters import LowRank, PackedAdapters, pack_adapters
from fastsample.ops.lora.weights import PackedLinear, pack_linear
from fastsample.ops.noise import randn
from fastsample.ops.posterior import posterior
from fastsample.ops.step import step

__all__ = [
    "LowRank",
    "PackedAdapters",
    "PackedLinear",
    "likelihood",
    "lora_linear",
    "pack_adapters",
    "pack_linear",
    "posterior",
    "prior_bits",
    "randn",
    "step",
]
