"""Philox and Box-Muller: what fastsample/ops/noise specifies. Writes 4 bytes a normal, reads nothing.

The values are those of csrc/common/philox.h and normal.h; comments say where other instructions give the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.kernels.arithmetic import INTERPRETED, fma, tl, triton
from fastsample.kernels.blocks import blocks_of, on, own_part, sample_size, tile_offsets

_NVIDIA = tl.constexpr(not INTERPRETED and torch.version.hip is None)


@triton.jit
def as_bits(v):
    """A float's bits."""
    return v.to(tl.uint32, bitcast=True)


@triton.jit
def as_float(bits):
    """The float that has these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def to_float(bits):
    """The float nearest to bits taken as a signed integer."""
    return bits.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """The four words of Philox4x32-10 (Salmon et al. 2011); all uint32."""
    for _ in tl.static_range(10):
        # Both words of a product by one instruction, where umulhi and a product would be two.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def minus_two_log(u):
    """-2 ln(u) for u in [2^-25, 1]."""
    # u's bits less those of the root of 1/2; the sum wraps.
    shifted = tl.add(as_bits(u), 0xC0CAFB0D, sanitize_overflow=False)
    exponent = shifted & 0xFF800000
    # 2^23 e: a power of two, taken back exactly by the constants.
    e = to_float(exponent)
    f = as_float((shifted & 0x007FFFFF) + 0x3F3504F3) - 1.0
    poly = fma(f, 0.152434260945, -0.258087663633)
    poly = fma(poly, f, 0.26485977313)
    poly = fma(poly, f, -0.283636664739)
    poly = fma(poly, f, 0.332181672404)
    poly = fma(poly, f, -0.400039470903)
    poly = fma(poly, f, 0.500031657938)
    poly = fma(poly, f, -0.666666513948)
    poly = fma(poly, f, 0.999999766945)
    low = fma(f * f, poly, e * (3.80930859991551e-9 / 8388608))
    return fma(e, -1.3862943649291992 / 8388608, fma(f, -2.0, low))


@triton.jit
def square_root(a):
    """The exactly rounded root of a = 0 or 1e-7 <= a <= 35."""
    if _NVIDIA:
        # What sqrt.rn.f32 compiles to where a is a normal number, without its test of that and its call.
        inverse = tl.rsqrt(tl.maximum(a, 1e-30))
        root = a * inverse
        return fma(fma(root * -1.0, root, a), inverse * 0.5, root)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def cos_sin_turn(y):
    """(cos, sin) of 2 pi (y >> 8) / 2^24: the quadrant is y's upper two bits after rounding, the rest is exact."""
    w = to_float((y << 2) & 0xFFFFFC00) * 2.3283064365386963e-10
    t = w * w
    sin_rest = fma(t, -0.0046016258610298, 0.079680022655315)
    sin_rest = fma(sin_rest, t, -0.64596345946306)
    s = fma(w, 1.57079637050628662, w * fma(sin_rest, t, -4.8806183e-8))
    cos_rest = fma(t, 0.00090376031407232, -0.020860162434832)
    cos_rest = fma(cos_rest, t, 0.25366922562316)
    cos_rest = fma(cos_rest, t, -1.2337005425854)
    c = fma(cos_rest, t, 1.0)
    quadrant = tl.add(y, 0x20000000, sanitize_overflow=False)
    odd = (quadrant & 0x40000000) != 0
    next_quadrant = tl.add(quadrant, 0x40000000, sanitize_overflow=False)
    cosine = as_bits(tl.where(odd, s, c)) ^ (next_quadrant & 0x80000000)
    sine = as_bits(tl.where(odd, c, s)) ^ (quadrant & 0x80000000)
    return as_float(cosine), as_float(sine)


@triton.jit
def box_muller(x, y):
    """Two normals from two words."""
    u = fma(to_float(x >> 8), 5.9604644775390625e-8, 2.98023223876953125e-8)
    radius = square_root(minus_two_log(u))
    cosine, sine = cos_sin_turn(y)
    return radius * cosine, radius * sine


@triton.jit
def normals(first, key, step, stream, QUADS: tl.constexpr):
    """Normals number first .. first + 4 QUADS - 1 of a sample's stream, [QUADS, 4]; first is a multiple of 4 QUADS."""
    quad = tl.cast(first, tl.int64) // 4
    # QUADS divides 2^32: the lower word never carries into the upper one inside a tile.
    low = quad.to(tl.uint32) + tl.arange(0, QUADS).to(tl.uint32)
    high = (quad >> 32).to(tl.uint32)
    key0 = key.to(tl.uint32)
    key1 = (key >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(low, high, step.to(tl.uint32), tl.cast(stream, tl.uint32), key0, key1)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    # Joined in this order a thread that made them has them side by side: no data moves.
    return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(QUADS, 4)


@triton.jit(do_not_specialize=["batch", "size", "parts", "step", "stream"])
def randn_kernel(
    out,  # [batch, size]
    keys,  # [batch]
    batch: tl.int64,
    size: tl.int64,
    parts: tl.int64,
    step: tl.int64,
    stream: tl.int64,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Each sample's normals."""
    size = sample_size(size, ALIGNED)
    sample, first, end = own_part(batch, size, parts, QUADS)
    key = tl.load(keys + sample)
    at = tile_offsets(QUADS)
    for begin in range(first, end, QUADS * 4):
        z = normals(begin, key, step, stream, QUADS)  # [QUADS, 4]
        tl.store(out + (sample * size + begin) + at, z, mask=at < size - begin)


def randn(out: Tensor, keys: Tensor, step: int, stream: int) -> None:
    """Fills contiguous float32 `out` (batch, ...) with each sample's normals; `keys` is int64 (batch,), beside it."""
    blocks = blocks_of(out.shape[0], out.numel() // out.shape[0])
    with on(out):
        randn_kernel[blocks.grid](
            out,
            keys,
            blocks.batch,
            blocks.size,
            blocks.parts,
            step,
            stream,
            QUADS=blocks.quads,
            ALIGNED=blocks.aligned,
            num_warps=blocks.num_warps,
            enable_fp_fusion=False,
        )
