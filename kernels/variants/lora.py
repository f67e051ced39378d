"""lora_linear's specialisations."""

from __future__ import annotations

from typing import Any

from fastsample.kernels.lora import tiles
from fastsample.kernels.lora.kernels import expand_kernel, shrink_kernel
from fastsample.kernels.lora.layout import RANK_STEP
from fastsample.kernels.lora.tiles import Blocks
from fastsample.kernels.variants import DTYPES, Variant


def variants() -> list[Variant]:
    """q, k and v of one input, for the static checks: every form, large and narrow tiles, with and without adapters."""
    specialisations = []
    for dtype in DTYPES:
        kind = "float" if dtype == "float32" else "half"
        few, alone, many = tiles.FEW[kind][-1], tiles.MANY_ALONE[kind][1], tiles.MANY[kind]
        specialisations += [
            _shrink(dtype, tiles.SHRINK[kind][-1]),
            _expand("expand", dtype, many[0], t=True),
            _expand("expand, large tile", dtype, many[3], t=True),
            _expand("one launch", dtype, alone),
            _expand("one launch, few rows, an adapter per sample", dtype, few, groups=2, index=True),
            _expand("no adapters, odd K", dtype, many[0], groups=0, whole=False),
        ]
    tile = tiles.MANY["float"][0]
    return [*specialisations, _expand("expand, tf32", "float32", tile, t=True, precision="tf32")]


def _shrink(dtype: str, blocks: Blocks) -> Variant:
    data = "*" + DTYPES[dtype]
    signature = {
        "x": data,
        "down": (data,),
        "scale": ("*fp32",),
        "t": data,
        "index": None,
        "ranks": ("fp32",) * 3,
        **dict.fromkeys(("rows", "k", "stride", "t_stride"), "i32"),
    }
    constants = {"index": None, "ROWS": blocks.rows, "RANKS": min(blocks.columns, 64)}
    return _variant("shrink", dtype, shrink_kernel, signature, constants, blocks, whole=True, precision="ieee")


def _expand(
    name: str,
    dtype: str,
    blocks: Blocks,
    t: bool = False,
    groups: int = 1,
    index: bool = False,
    whole: bool = True,
    precision: str = "ieee",
) -> Variant:
    data, linears = "*" + DTYPES[dtype], 3
    signature = {
        "x": data,
        "w": data,
        "bias": "*fp32",
        "down": (data,) * groups,
        "up": (data,) * groups,
        "scale": ("*fp32",) * groups,
        "t": data if t else None,
        "index": "*i64" if index else None,
        "ys": (data,) * linears,
        "ns": ("i32",) * linears,
        "ranks": ("fp32",) * linears * groups,
        **dict.fromkeys(("rows", "k", "stride", "t_stride"), "i32"),
    }
    absent = {key: None for key, kind in signature.items() if kind is None}
    constants = {**absent, "ROWS": blocks.rows, "COLUMNS": blocks.columns, "RANKS": RANK_STEP}
    return _variant(name, dtype, expand_kernel, signature, constants, blocks, whole, precision)


def _variant(
    name: str,
    dtype: str,
    kernel: Any,
    signature: dict[str, Any],
    constants: dict[str, Any],
    blocks: Blocks,
    whole: bool,
    precision: str,
) -> Variant:
    constants = {**constants, "DEPTH": blocks.depth, "WHOLE": whole, "PRECISION": precision, "UPCAST": False}
    unaligned = {"rows", "ranks"} | (set() if whole else {"k", "stride"})
    return Variant(
        op="lora_linear",
        name=name,
        dtype=dtype,
        kernel=kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        aligned=tuple(key for key, kind in signature.items() if kind is not None and key not in unaligned),
        elements=0,
        bytes_per_element=0.0,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        registers=tiles.REGISTERS,
    )
