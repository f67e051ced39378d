"""Philox4x32-10 and Box-Muller in plain torch: the specification of every backend's noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def randn_reference(shape: Sequence[int], keys: Tensor, step: int, stream: int) -> Tensor:
    """`randn` in plain torch; `keys` is an int64 tensor on the device of the result."""
    batch, size = shape[0], torch.Size(shape[1:]).numel()
    j = torch.arange(-(-size // 4), device=keys.device)
    counter = [j & 0xFFFFFFFF, j >> 32, torch.full_like(j, step), torch.full_like(j, stream)]
    words = philox_reference(counter, (keys & 0xFFFFFFFF)[:, None], (keys >> 32 & 0xFFFFFFFF)[:, None])
    normals = [*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])]
    return torch.stack(normals, dim=-1).reshape(batch, -1)[:, :size].reshape(shape)


def philox_reference(counter: Sequence[Tensor], key0: Tensor, key1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) on int64 tensors that hold unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiply(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    # In 16-bit halves: the 64-bit product itself would not fit int64.
    lower = a * (factor & 0xFFFF)
    upper = a * (factor >> 16) + (lower >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | (lower & 0xFFFF)


def _box_muller(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    # float64 tensors that hold float32 values, rounded where the kernels round (csrc/common/normal.h).
    u1 = _round((x >> 8).double() * 2**-24 + 2**-25)
    radius = _round(_minus_two_log(u1).sqrt())
    cosine, sine = _cos_sin_turn(y >> 8)
    return (radius * cosine).float(), (radius * sine).float()


def _minus_two_log(u: Tensor) -> Tensor:
    root_half = 0x3F3504F3
    shifted = u.float().view(torch.int32) - root_half
    e = (shifted >> 23).double()
    f = ((shifted & 0x007FFFFF) + root_half).view(torch.float32).double() - 1
    low = _fma(_round(f * f), _polynomial(_LOG, f), _round(e * _MINUS_TWO_LN2_LOW))
    return _fma(e, _MINUS_TWO_LN2, _fma(f, -2.0, low))


def _cos_sin_turn(k: Tensor) -> tuple[Tensor, Tensor]:
    quadrant = (k + (1 << 21)) >> 22
    w = (k - (quadrant << 22)).double() * 2**-22
    t = _round(w * w)
    s = _fma(w, _HALF_PI, _round(w * _polynomial((*_SINE, _HALF_PI_LOW), t)))
    c = _polynomial((*_COSINE, 1.0), t)
    odd = (quadrant & 1) != 0
    cosine = torch.where(odd, s, c) * (1 - (quadrant + 1 & 2))
    sine = torch.where(odd, c, s) * (1 - (quadrant & 2))
    return cosine, sine


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(value, x, coefficient)
    return value


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    return _round(a * b + c)


def _round(value: Tensor) -> Tensor:
    return value.float().double()


def _float32(*values: float) -> tuple[float, ...]:
    return tuple(torch.tensor(values, dtype=torch.float32, device="cpu").tolist())


# The constants of csrc/common/normal.h, highest power first.
_LOG = _float32(
    0.152434260945, -0.258087663633, 0.26485977313, -0.283636664739, 0.332181672404, -0.400039470903,
    0.500031657938, -0.666666513948, 0.999999766945,
)  # fmt: skip
_SINE = _float32(-0.0046016258610298, 0.079680022655315, -0.64596345946306)
_COSINE = _float32(0.00090376031407232, -0.020860162434832, 0.25366922562316, -1.2337005425854)
_MINUS_TWO_LN2, _MINUS_TWO_LN2_LOW = _float32(-1.3862943649291992, 3.80930859991551e-9)
_HALF_PI, _HALF_PI_LOW = _float32(1.57079637050628662, -4.8806183e-8)
