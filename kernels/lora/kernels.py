"""shrink_kernel and expand_kernel: the base product's sum over K runs on over the ranks.

A program's rows lie in one sample, so that one adapter serves them all. In memory ranks are padded to multiples of 16
with zeros (layout.py), so that factors are read in whole vectors. t is cut off at the rank nevertheless: where x is
infinite, 0 * x is not 0. Ranks arrive as floats: Triton compiles a kernel anew for integers of another divisibility.

Adapters come in groups; a group has one pair of factors for every linear. `down`, `up` and `scale` are tuples of one
tensor a group: down is [columns, K], all linears' padded ranks one after the other, up the [N_i, padded rank] of all
linears behind one another, scale [columns]. `ranks` and `ns` are tuples of numbers.
"""

from __future__ import annotations

from fastsample.kernels.arithmetic import tl, triton
from fastsample.kernels.lora.layout import RANK_STEP

# Row tiles that run side by side read the same weights: those of so many are in the L2 cache together.
_NEIGHBOURS = tl.constexpr(8)
_STEP = tl.constexpr(RANK_STEP)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def sum_over_k(
    x, w, a, k, acc, low,
    DEPTH: tl.constexpr, WHOLE: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + x w and, if LOW, low + x a; the pointers are to the first DEPTH of k features."""
    features = tl.arange(0, DEPTH)
    for first in range(0, k, DEPTH):
        inside = features < k - first
        if WHOLE:
            xs, ws = tl.load(x), tl.load(w)  # [ROWS, DEPTH], [DEPTH, COLUMNS]
        else:
            xs, ws = tl.load(x, mask=inside[None, :], other=0.0), tl.load(w, mask=inside[:, None], other=0.0)
        acc = product(xs, ws, acc, PRECISION, UPCAST)
        if LOW:
            factors = tl.load(a) if WHOLE else tl.load(a, mask=inside[:, None], other=0.0)  # [DEPTH, RANKS]
            low = product(xs, factors, low, PRECISION, UPCAST)
            a += DEPTH
        x += DEPTH
        w += DEPTH
    return acc, low


@triton.jit
def group_of(index, sample):
    """The sample's group of adapters."""
    group = tl.zeros((), tl.int64)
    if index is not None:
        group = tl.load(index + sample)
    return group


@triton.jit
def padded_rank(rank):
    """The rank that there is memory for."""
    return (rank + _STEP - 1) // _STEP * _STEP


@triton.jit
def factors_of(group, linear, down, up, scale, ranks, ns):
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
            width = padded_rank(own)
            columns += width
            elements += width * ns[i]
    return a, b, factor, rank, column, element


@triton.jit
def down_of(group, down, scale, ranks):
    """The group's down factors, its scales and how many columns it has; the first group's and 0 where it is none."""
    columns, a, factor = group * 0, down[0], scale[0]
    for g in tl.static_range(len(down)):
        a, factor = tl.where(group == g, down[g], a), tl.where(group == g, scale[g], factor)
        for i in tl.static_range(len(ranks) // len(down)):
            own = (group * 0 + ranks[g * (len(ranks) // len(down)) + i]).to(tl.int64)
            columns += tl.where(group == g, padded_rank(own), 0)
    return a, factor, columns


@triton.jit(do_not_specialize=["rows"])
def shrink_kernel(
    x, down, scale, t,  # [M, K]; down and scale by group; [M, t_stride]
    index, ranks,  # int64 [samples] or None
    rows, k, stride, t_stride,
    ROWS: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """t = x A^T * scale: all linears' columns of each sample's group, one after the other."""
    tiles = tl.cdiv(rows, ROWS)
    sample = tl.program_id(0) // tiles
    a, factor, columns = down_of(group_of(index, sample), down, scale, ranks)
    column = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    if tl.program_id(1) * RANKS < columns:
        row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
        place = sample.to(tl.int64) * rows + tl.minimum(row, rows - 1)
        features = tl.arange(0, DEPTH)
        factors = a + tl.minimum(column, columns - 1)[None, :] * k + features[:, None]
        low = tl.zeros((ROWS, RANKS), tl.float32)
        xs = x + place[:, None] * stride + features[None, :]
        low, _ = sum_over_k(xs, factors, factors, k, low, low, DEPTH, WHOLE, False, PRECISION, UPCAST)
        scales = tl.load(factor + column, mask=column < columns, other=0.0)  # [RANKS]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        low = (low * scales[None, :]).to(t.dtype.element_ty)
        tl.store(t + place[:, None] * t_stride + column[None, :], low, mask=inside)


@triton.jit
def own_tile(ns, COLUMNS: tl.constexpr):
    """(row tile, column tile among those of all linears) of this program, in bands of _NEIGHBOURS row tiles."""
    tiles_n = tl.zeros((), tl.int32)
    for i in tl.static_range(len(ns)):
        tiles_n += tl.cdiv(ns[i], COLUMNS)
    tiles_m, band = tl.num_programs(0) // tiles_n, _NEIGHBOURS * tiles_n
    first = tl.program_id(0) // band * _NEIGHBOURS
    height = tl.minimum(tiles_m - first, _NEIGHBOURS)
    return first + tl.program_id(0) % band % height, tl.program_id(0) % band // height


@triton.jit
def linear_at(tile, ns, ys, COLUMNS: tl.constexpr):
    """The linear that a column tile lies in: its place, columns, first row among all weights, output and first tile."""
    linear, n, start, y = tile * 0, tile * 0 + ns[0], tile * 0, ys[0]
    skipped, weights = tl.cdiv(ns[0], COLUMNS), ns[0]
    begin = tile * 0
    for i in tl.static_range(1, len(ns)):
        here = tile >= skipped
        linear, n, start = tl.where(here, i, linear), tl.where(here, ns[i], n), tl.where(here, weights, start)
        y, begin = tl.where(here, ys[i], y), tl.where(here, skipped, begin)
        skipped += tl.cdiv(ns[i], COLUMNS)
        weights += ns[i]
    return linear, n, start, y, begin


@triton.jit
def with_given_t(
    acc, t, ups, r, rank, width, RANKS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """acc + t B^T; the pointers are to the first RANKS of `width` ranks, which are r, [RANKS]."""
    for done in tl.range(0, width, RANKS, num_stages=1):
        inside = r < width - done
        part = tl.load(t + done, mask=inside[None, :], other=0.0)  # [ROWS, RANKS]
        part = tl.where((r < rank - done)[None, :], part, 0.0)
        up = tl.load(ups + done, mask=inside[:, None], other=0.0)  # [RANKS, COLUMNS]
        acc = product(part, up, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def with_own_t(
    acc, low, scale, ups, r, rank, width, dtype: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """acc + t B^T, where t is low * scale in the dtype that it would have in memory; r are the ranks, [RANKS]."""
    scales = tl.load(scale + r, mask=r < width, other=0.0)  # [RANKS]
    t = tl.where((r < rank)[None, :], low * scales[None, :], 0.0).to(dtype)
    up = tl.load(ups, mask=(r < width)[:, None], other=0.0)  # [RANKS, COLUMNS]
    return product(t, up, acc, PRECISION, UPCAST)


@triton.jit(do_not_specialize=["rows"])
def expand_kernel(
    x, w, bias,  # [M, K], [all N_i, K], float32 [all N_i] or None
    down, up, scale, t,  # by group; [M, t_stride] or None
    index, ys, ns, ranks,  # int64 [samples] or None; ys are [M, N_i]
    rows, k, stride, t_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y_i = x W_i^T + b_i + t_i B_i^T for every linear i, on shrink_kernel's t or, where it is None, one of its own."""
    tile_m, tile_n = own_tile(ns, COLUMNS)
    linear, n, start, y, begin = linear_at(tile_n, ns, ys, COLUMNS)

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
        acc, low = sum_over_k(xs, ws, ws, k, acc, low, DEPTH, WHOLE, False, PRECISION, UPCAST)
    else:
        group = group_of(index, sample)
        a, b, factor, rank, first, element = factors_of(group, linear, down, up, scale, ranks, ns)
        width = padded_rank(rank)
        r = tl.arange(0, RANKS)
        ups = b + element + within[None, :] * width + r[:, None]
        if t is None:
            if rank > 0:
                factors = a + first * k + tl.minimum(r, width - 1)[None, :] * k + features[:, None]
                acc, low = sum_over_k(xs, ws, factors, k, acc, low, DEPTH, WHOLE, True, PRECISION, UPCAST)
                kind: tl.constexpr = x.dtype.element_ty
                acc = with_own_t(acc, low, factor + first, ups, r, rank, width, kind, PRECISION, UPCAST)
            else:
                acc, low = sum_over_k(xs, ws, ws, k, acc, low, DEPTH, WHOLE, False, PRECISION, UPCAST)
        else:
            acc, low = sum_over_k(xs, ws, ws, k, acc, low, DEPTH, WHOLE, False, PRECISION, UPCAST)
            ts = t + place[:, None] * t_stride + first + r[None, :]
            acc = with_given_t(acc, ts, ups, r, rank, width, RANKS, PRECISION, UPCAST)
        if index is not None:
            acc = tl.where((group < -1) | (group >= len(down)), float("nan"), acc)
    if bias is not None:
        acc += tl.load(bias + start + within)[None, :]  # [1, COLUMNS]
    inside = (row < rows)[:, None] & (column < n)[None, :]
    tl.store(y + place[:, None] * n + column[None, :], acc.to(y.dtype.element_ty), mask=inside)
