"""The noise's specialisations."""

from __future__ import annotations

from fastsample.kernels.blocks import QUADS
from fastsample.kernels.noise import randn_kernel
from fastsample.kernels.variants import Variant


def variants() -> list[Variant]:
    """What the static checks compile."""
    integers = dict.fromkeys(("batch", "size", "parts", "step", "stream"), "i64")
    signature = {"out": "*fp32", "keys": "*i64", **integers, "QUADS": "constexpr", "ALIGNED": "constexpr"}
    return [
        Variant(
            "noise",
            name,
            "float32",
            randn_kernel,
            signature,
            {"QUADS": QUADS, "ALIGNED": aligned},
            aligned=("out", "keys"),
            elements=4 * QUADS,
            bytes_per_element=4,
        )
        for name, aligned in (("", True), ("odd size", False))
    ]
