"""The reductions' specialisations: one row for all samples, no guidance rescale beside a threshold."""

from __future__ import annotations

from typing import Any

from fastsample.kernels import reductions
from fastsample.kernels.variants import BYTES, DTYPES, Variant, chunked

_TYPES = {
    "x": "*fp32", "rows": "*fp32", "guidance": "*fp32", "out": "*fp32", "magnitudes": "*i32", "counts": "*i64",
    "scratch": "*fp64", "row_count": "i32", "row": "i32", "batch": "i32", "chunks": "i32", "size": "i32",
    "m_stride": "i32", "phi": "fp32",
}  # fmt: skip


def variants() -> list[Variant]:
    """What the static checks compile."""
    halves, counted = {"BLOCK": reductions.MOMENTS_BLOCK}, {"BLOCK": reductions.COUNT_BLOCK, "row_of": None}
    once: list[tuple[str, Any, dict[str, Any], int, int]] = [
        ("factor", reductions.factor_kernel, {"BLOCK": reductions.COMBINED}, 0, 1),
        ("quantile", reductions.quantile_kernel, {"row_of": None}, 0, 4),
    ]
    for digit in range(1, reductions.DIGITS):
        once.append((f"digit {digit}", reductions.digits_kernel, {"DIGIT": digit, **counted}, 4, 4))
    specialisations = [_variant(name, "float32", *rest) for name, *rest in once]
    for dtype, width in BYTES.items():
        free = {"factors": None, **counted}
        specialisations += [
            _variant("moments", dtype, reductions.moments_kernel, halves, 2 * width, 4),
            _variant("magnitudes, guided", dtype, reductions.magnitudes_kernel, free, 2 * width + 8, 4),
            _variant("magnitudes", dtype, reductions.magnitudes_kernel, {"guidance": None, **free}, width + 8, 4),
        ]
    return specialisations


def _variant(name: str, dtype: str, kernel: Any, constants: dict[str, Any], bytes_moved: int, warps: int) -> Variant:
    types = {**_TYPES, "m": f"*{DTYPES[dtype]}"}
    return chunked(types, "reductions", name, dtype, kernel, constants, bytes_moved, warps)
