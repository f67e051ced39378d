"""What the kernels share: exact fma, 2^x, rounding to 16 bits; csrc/common/exp2.h on Triton's terms.

Explicit fma, exactly rounded square root and division, fusion of others off where kernels are launched: the same bits
as the CPU kernels. Triton is imported here, so that its absence, or one that is too old, is told in one way.
"""

from __future__ import annotations

import re

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"Triton kernels need the package triton: pip install 'fastsample[triton]' ({error})") from error

MINIMUM = (3, 4)
"""Of triton, as in pyproject.toml: histograms take a mask since then."""

if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < MINIMUM:
    raise ImportError(
        f"Triton kernels need triton {'.'.join(map(str, MINIMUM))} or newer, not {triton.__version__}: "
        "pip install -U 'fastsample[triton]'"
    )


@triton.jit
def fma(x, y, z):
    """x y + z, rounded once."""
    if _INTERPRETED:
        # NumPy has no fma. The product is exact in float64 and the sum rounds twice, which differs once in 2^29.
        product = tl.cast(x, tl.float64) * tl.cast(y, tl.float64)
        return (product + tl.cast(z, tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def guide(unconditional, conditional, weight):
    """The model's output under guidance: exactly one half at a weight of 1 or 0, where the other has no coefficient."""
    between = fma(conditional - unconditional, weight - 1.0, conditional)
    return tl.where(weight == 1.0, conditional, tl.where(weight == 0.0, unconditional, between))


INTERPRETED: bool = not isinstance(fma, triton.JITFunction)
"""Kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 was set when they were imported."""

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """v in another floating dtype, to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion truncates.
        bits = v.to(tl.uint32, bitcast=True)
        upper = tl.where(v != v, (bits >> 16) | 0x40, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(dtype)


@triton.jit
def bounded_exponent(x):
    """x in [-126, 127]; NaN stays NaN."""
    bounded = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(bounded, 127.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp2_of(x):
    """2^x for x in [-126, 127], beyond which it stays at the ends' values; NaN stays NaN."""
    bounded = bounded_exponent(x)
    # 1.5 * 2^23 + 127: adding it rounds to an integer n, and leaves n + 127, the exponent's code of 2^n, in the low
    # bits.
    shifted = bounded + 12583039.0
    r = bounded - (shifted - 12583039.0)
    poly = fma(r, 0.00015326483117, 0.00133908097632)
    poly = fma(poly, r, 0.00961850583553)
    poly = fma(poly, r, 0.0555035993457)
    poly = fma(poly, r, 0.240226477385)
    poly = fma(poly, r, 0.693147182465)
    poly = fma(poly, r, 1.0)
    return poly * (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
