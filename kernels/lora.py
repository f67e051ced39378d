"""Linears of one input with low-rank adapters: the base product's sum over K runs on over the ranks.

Two forms. `shrink`, then `expand`: t = x A^T * scale for all linears in one pass over x, then y, whose accumulator
takes the low-rank part where the base product ends. Or `expand` alone, which sums its own t beside the base product in
the same loop over K: nothing but y is written, and every tile of y repeats t's products.

A program's rows lie in one sample, so that one adapter serves them all. In memory ranks are padded to multiples of 16
with zeros (ops/lora_pack.py), so that factors are read in whole vectors. t is cut off at the rank nevertheless: where x
is infinite, 0 * x is not 0. Ranks arrive as floats: Triton compiles a kernel anew for integers of another divisibility.
"""

from __future__ import annotations

from typing import Any

from fastsample.kernels import lora_tiles
from fastsample.kernels.arithmetic import tl, triton
from fastsample.kernels.lora_layout import RANK_STEP
from fastsample.kernels.lora_tiles import Blocks
from fastsample.kernels.variants import Variant

# Row tiles that run side by side read the same weights: those of so many are in the L2 cache together.
_NEIGHBOURS = tl.constexpr(8)
_STEP = tl.constexpr(RANK_STEP)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _sum_over_k(
    x,
    w,
    a,
    k,
    acc,
    low,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc + x w and, if LOW, low + x a; the pointers are to the first DEPTH of k features."""
    features = tl.arange(0, DEPTH)
    for first in range(0, k, DEPTH):
        inside = features < k - first
        if WHOLE:
            xs, ws = tl.load(x), tl.load(w)
        else:
            xs, ws = tl.load(x, mask=inside[None, :], other=0.0), tl.load(w, mask=inside[:, None], other=0.0)
        acc = _dot(xs, ws, acc, PRECISION, UPCAST)
        if LOW:
            factors = tl.load(a) if WHOLE else tl.load(a, mask=inside[:, None], other=0.0)
            low = _dot(xs, factors, low, PRECISION, UPCAST)
            a += DEPTH
        x += DEPTH
        w += DEPTH
    return acc, low


@triton.jit
def _factors_of(group, linear, down, up, scale, ranks, ns):
    """The group's three tensors; of its factors for this linear the rank, first column in t and first element in up.

    The first group's tensors and rank 0 where the index is not a group's.
    """
    a, b, factor = down[0], up[0], scale[0]
    rank, column, element = group * 0, group * 0, group * 0
    for g in tl.static_range(len(down)):
        a, b = tl.where(group == g, down[g], a), tl.where(group == g, up[g], b)
        factor = tl.where(group == g, scale[g], factor)
        columns, elements = group * 0, group * 0
        for i in tl.static_range(len(ns)):
            own = (group * 0 + ranks[g * len(ns) + i]).to(tl.int64)
            here = (group == g) & (linear == i)
            rank = tl.where(here, own, rank)
            column = tl.where(here, columns, column)
            element = tl.where(here, elements, element)
            width = (own + _STEP - 1) // _STEP * _STEP
            columns += width
            elements += width * ns[i]
    return a, b, factor, rank, column, element


@triton.jit(do_not_specialize=["rows"])
def shrink(
    x,
    down,
    scale,
    t,
    index,
    ranks,
    rows,
    k,
    stride,
    t_stride,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """t = x A^T * scale: all linears' columns of each sample's group, one after the other."""
    tiles = tl.cdiv(rows, ROWS)
    sample = tl.program_id(0) // tiles
    group = tl.zeros((), tl.int64)
    if index is not None:
        group = tl.load(index + sample)
    columns, a, factor = group * 0, down[0], scale[0]
    for g in tl.static_range(len(down)):
        a, factor = tl.where(group == g, down[g], a), tl.where(group == g, scale[g], factor)
        for i in tl.static_range(len(ranks) // len(down)):
            own = (group * 0 + ranks[g * (len(ranks) // len(down)) + i]).to(tl.int64)
            columns += tl.where(group == g, (own + _STEP - 1) // _STEP * _STEP, 0)
    column = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    if tl.program_id(1) * RANKS < columns:
        row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
        place = sample.to(tl.int64) * rows + tl.minimum(row, rows - 1)
        features = tl.arange(0, DEPTH)
        factors = a + tl.minimum(column, columns - 1)[None, :] * k + features[:, None]
        low = tl.zeros((ROWS, RANKS), tl.float32)
        low, _ = _sum_over_k(
            x + place[:, None] * stride + features[None, :],
            factors,
            factors,
            k,
            low,
            low,
            DEPTH,
            WHOLE,
            False,
            PRECISION,
            UPCAST,
        )
        scales = tl.load(factor + column, mask=column < columns, other=0.0)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        low = (low * scales[None, :]).to(t.dtype.element_ty)
        tl.store(t + place[:, None] * t_stride + column[None, :], low, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def expand(
    x,
    w,
    bias,
    down,
    up,
    scale,
    t,
    index,
    ys,
    ns,
    ranks,
    rows,
    k,
    stride,
    t_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y_i = x W_i^T + b_i + t_i B_i^T for every linear i, on t of shrink or, where that is None, on a t of its own."""
    tiles_n = tl.zeros((), tl.int32)
    for i in tl.static_range(len(ns)):
        tiles_n += tl.cdiv(ns[i], COLUMNS)
    tiles_m, band = tl.num_programs(0) // tiles_n, _NEIGHBOURS * tiles_n
    first = tl.program_id(0) // band * _NEIGHBOURS
    height = tl.minimum(tiles_m - first, _NEIGHBOURS)
    tile_m, tile_n = first + tl.program_id(0) % band % height, tl.program_id(0) % band // height

    # The linear that the tile lies in: its place, columns, first row among all weights, and output.
    linear, n, start, y = tile_n * 0, tile_n * 0 + ns[0], tile_n * 0, ys[0]
    skipped, weights = tl.cdiv(ns[0], COLUMNS), ns[0]
    begin = tile_n * 0
    for i in tl.static_range(1, len(ns)):
        here = tile_n >= skipped
        linear, n, start = tl.where(here, i, linear), tl.where(here, ns[i], n), tl.where(here, weights, start)
        y, begin = tl.where(here, ys[i], y), tl.where(here, skipped, begin)
        skipped += tl.cdiv(ns[i], COLUMNS)
        weights += ns[i]

    tiles = tl.cdiv(rows, ROWS)
    sample = tile_m // tiles
    row = tile_m % tiles * ROWS + tl.arange(0, ROWS)
    column = (tile_n - begin) * COLUMNS + tl.arange(0, COLUMNS)
    # Rows and columns past the end repeat the last one: the loop needs no mask for them, only the store does.
    place = sample.to(tl.int64) * rows + tl.minimum(row, rows - 1)
    within = tl.minimum(column, n - 1).to(tl.int64)
    features = tl.arange(0, DEPTH)
    xs = x + place[:, None] * stride + features[None, :]
    ws = w + (start + within)[None, :] * k + features[:, None]

    acc, low = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, RANKS), tl.float32)
    if len(down) == 0:
        acc, low = _sum_over_k(xs, ws, ws, k, acc, low, DEPTH, WHOLE, False, PRECISION, UPCAST)
    else:
        group = tl.zeros((), tl.int64)
        if index is not None:
            group = tl.load(index + sample)
        a, b, factor, rank, first_rank, element = _factors_of(group, linear, down, up, scale, ranks, ns)
        width = (rank + _STEP - 1) // _STEP * _STEP
        r = tl.arange(0, RANKS)
        ups = b + element + within[None, :] * width + r[:, None]
        if t is None:
            if rank > 0:
                factors = a + first_rank * k + tl.minimum(r, width - 1)[None, :] * k + features[:, None]
                acc, low = _sum_over_k(xs, ws, factors, k, acc, low, DEPTH, WHOLE, True, PRECISION, UPCAST)
                scales = tl.load(factor + first_rank + r, mask=r < width, other=0.0)
                own_t = tl.where((r < rank)[None, :], low * scales[None, :], 0.0).to(x.dtype.element_ty)
                acc = _dot(own_t, tl.load(ups, mask=(r < width)[:, None], other=0.0), acc, PRECISION, UPCAST)
            else:
                acc, low = _sum_over_k(xs, ws, ws, k, acc, low, DEPTH, WHOLE, False, PRECISION, UPCAST)
        else:
            acc, low = _sum_over_k(xs, ws, ws, k, acc, low, DEPTH, WHOLE, False, PRECISION, UPCAST)
            ts = t + place[:, None] * t_stride + first_rank + r[None, :]
            for done in tl.range(0, width, RANKS, num_stages=1):
                inside = r < width - done
                part = tl.load(ts + done, mask=inside[None, :], other=0.0)
                part = tl.where((r < rank - done)[None, :], part, 0.0)
                acc = _dot(part, tl.load(ups + done, mask=inside[:, None], other=0.0), acc, PRECISION, UPCAST)
        if index is not None:
            acc = tl.where((group < -1) | (group >= len(down)), float("nan"), acc)
    if bias is not None:
        acc += tl.load(bias + start + within)[None, :]
    inside = (row < rows)[:, None] & (column < n)[None, :]
    tl.store(y + place[:, None] * n + column[None, :], acc.to(y.dtype.element_ty), mask=inside)


_LETTERS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def variants() -> list[Variant]:
    """q, k and v of one input, for the static checks: every form, large and narrow tiles, with and without adapters."""
    made = []
    for dtype, letters in _LETTERS.items():
        kind = "float" if letters == "fp32" else "half"
        few, alone, many = lora_tiles.FEW[kind][-1], lora_tiles.MANY_ALONE[kind][1], lora_tiles.MANY[kind]
        made += [
            _shrink(dtype, lora_tiles.SHRINK[kind][-1]),
            _expand("expand", dtype, many[0], t=True),
            _expand("expand, large tile", dtype, many[3], t=True),
            _expand("one launch", dtype, alone),
            _expand("one launch, few rows, an adapter per sample", dtype, few, groups=2, index=True),
            _expand("no adapters, odd K", dtype, many[0], groups=0, whole=False),
        ]
    tile = lora_tiles.MANY["float"][0]
    return [*made, _expand("expand, tf32", "float32", tile, t=True, precision="tf32")]


def _shrink(dtype: str, blocks: Blocks) -> Variant:
    data = "*" + _LETTERS[dtype]
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
    return _variant("shrink", dtype, shrink, signature, constants, blocks, whole=True, precision="ieee")


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
    data, linears = "*" + _LETTERS[dtype], 3
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
    return _variant(name, dtype, expand, signature, constants, blocks, whole, precision)


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
        registers=lora_tiles.REGISTERS,
    )
