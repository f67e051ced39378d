"""The likelihood's specialisations."""

from __future__ import annotations

from fastsample.kernels.likelihood import BLOCK, COMBINED, bits_kernel, terms_kernel
from fastsample.kernels.variants import BYTES, DTYPES, Variant


def variants() -> list[Variant]:
    """What the static checks compile."""
    specialisations = []
    for dtype in DTYPES:
        signature = {
            "coefficients": "*fp32", "row_count": "i32", "row_of": "constexpr", "row": "i32", "x_start": "*fp32",
            "x": "*fp32", "m": f"*{DTYPES[dtype]}", "m_stride": "i32", "size": "i32", "partial": "*fp64",
            "BLOCK": "constexpr",
        }  # fmt: skip
        aligned = ("coefficients", "x_start", "x", "m", "m_stride", "size", "partial")
        moved = 8 + 2 * BYTES[dtype]
        constants = {"BLOCK": BLOCK, "row_of": None}
        specialisations.append(
            Variant("likelihood", "terms", dtype, terms_kernel, signature, constants, aligned, BLOCK, moved)
        )
    signature = {"partial": "*fp64", "chunks": "i32", "size": "i32", "out": "*fp32", "BLOCK": "constexpr"}
    bits = Variant(
        "likelihood", "bits", "float32", bits_kernel, signature, {"BLOCK": COMBINED}, ("partial", "out"), 0, 0, 1
    )
    return [*specialisations, bits]
