"""The log variance's specialisations; the mean is a step."""

from __future__ import annotations

from fastsample.kernels.blocks import QUADS
from fastsample.kernels.posterior import log_variance_kernel
from fastsample.kernels.variants import BYTES, DTYPES, Variant


def variants() -> list[Variant]:
    """What the static checks compile; the mean is a step."""
    integers = dict.fromkeys(("batch", "size", "parts"), "i64")
    return [
        Variant(
            "posterior",
            "log variance",
            dtype,
            log_variance_kernel,
            {"m": f"*{short}", "constant": "*fp32", "slope": "*fp32", "out": "*fp32", **integers}
            | {"QUADS": "constexpr", "ALIGNED": "constexpr"},
            {"QUADS": QUADS, "ALIGNED": True},
            aligned=("m", "constant", "slope", "out"),
            elements=4 * QUADS,
            bytes_per_element=4 + BYTES[dtype],
        )
        for dtype, short in DTYPES.items()
    ]
