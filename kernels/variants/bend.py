"""The specialisations of guidance by other methods: those with the most to do."""

from __future__ import annotations

from typing import Any

from fastsample.kernels import bend
from fastsample.kernels.variants import BYTES, DTYPES, Variant, chunked

_TYPES = {
    "m_stride": "i32", "batch": "i32", "size": "i32", "chunks": "i32", "moved": "*fp32", "momentum": "fp32",
    "sums": "*fp64", "weights": "*fp32", "phi": "fp32", "eta": "fp32", "norm_threshold": "fp32", "shares": "*fp32",
    "out": "*fp32",
}  # fmt: skip


def variants() -> list[Variant]:
    """What the static checks compile."""
    shares = {"METHOD": 2, "MOVES": True, "RESCALES": True, "BLOCK": bend.COMBINED}
    specialisations = [_variant("shares", "float32", bend.shares_kernel, shares, 0, 1)]
    for dtype, width in BYTES.items():
        halves: dict[str, Any] = {"BLOCK": bend.BLOCK}
        whole = {"VARIANCE": True, **halves}
        specialisations += [
            _variant("sums", dtype, bend.sums_kernel, {"moved": None, **halves}, 2 * width, 4),
            _variant("sums, momentum", dtype, bend.sums_kernel, halves, 2 * width + 8, 4),
            _variant("combine, momentum", dtype, bend.combine_kernel, whole, 3 * width + 12, 4),
        ]
    return specialisations


def _variant(name: str, dtype: str, kernel: Any, constants: dict[str, Any], bytes_moved: int, warps: int) -> Variant:
    types = {**_TYPES, "output": f"*{DTYPES[dtype]}"}
    return chunked(types, "bend", name, dtype, kernel, constants, bytes_moved, warps)
