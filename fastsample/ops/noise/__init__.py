"""Standard normals that depend on key, position, step and stream alone: Philox4x32-10 and Box-Muller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from fastsample.checks import checked_shape, integer
from fastsample.ops.address import address, check_written
from fastsample.ops.backend import choose, cpu_module, cuda_module, place
from fastsample.ops.memory import fresh, mark_written
from fastsample.ops.noise.keys import Index, Seed, sample_keys
from fastsample.ops.tracing import outside, traced, transformed

INITIAL, STEP = 0, 1  # streams: x_T, and the noise that samplers add; never shared


def randn(
    shape: Sequence[int],
    *,
    seed: Seed | None = None,
    index: Index = 0,
    step: int = 0,
    stream: int = INITIAL,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standard normal float32 noise, the same bits for any batch size, thread count, instruction set and device.

    The first axis holds samples. A seed names an endless set of them; sample i of the call is the one at place
    index + i. Element i of a sample (row-major) is number i % 4 of the four normals made from

        key(seed, place) = mix(mix(seed) + place),  mix the finaliser of splitmix64, modulo 2^64
        j = i // 4,  (w0, w1, w2, w3) = philox4x32_10(counter=(j mod 2^32, j div 2^32, step, stream), key=key)
        u = (w0 >> 8) 2^-24 + 2^-25,  r = sqrt(-2 ln u),  a = 2 pi (w1 >> 8) 2^-24,  normals r cos(a) and r sin(a)

    and the same from w2, w3 (Salmon et al. 2011; Box & Muller 1958). |value| < 5.9. The error against these formulas is
    below 3 ulp of float32; the reference backend equals the kernels within 1 ulp. Two places of one seed never share a
    key; two seeds share one as often as random 64-bit numbers are equal.

    Under torch.compile it is one registered op, and `seed`, `index` and `step` may change without compiling again.

    Args:
        shape: (samples, ...), nothing zero.
        seed: an int, modulo 2^64, which names the set; or one per sample (sequence or integer tensor), each the one at
            place `index` of a set of its own. None takes a fresh one from torch's default generator, which
            torch.manual_seed governs.
        index: the place of the first sample in the set, at least 0: the next batch of B starts at index + B. Or the
            place of every sample (sequence or integer tensor).
        step: 0 .. 2^32 - 1, the row of the table the noise belongs to.
        stream: 0 .. 2^32 - 1; 0 is initial noise, 1 the noise that samplers add.
        device: where a fresh result lies; default CPU.
        out: float32 tensor of this shape to fill instead, of any strides.
        backend: see fastsample.backends().

    Returns:
        `out`, or a fresh contiguous tensor.

    Raises:
        ValueError: for an empty shape, a wrong number of seeds or places, a place below 0, step or stream out of range,
            `out` of another shape or device. TypeError: for seeds and places that are not integers or an `out` that is
            not float32.

    Example:
        >>> a = randn((4, 3, 8, 8), seed=7)
        >>> b = randn((1, 3, 8, 8), seed=7, index=2)
        >>> torch.equal(a[2:3], b)
        True
    """
    shape = checked_shape("shape", shape)
    for name, value in (("step", step), ("stream", stream)):
        if not 0 <= as_int(name, value) < 2**32:
            raise ValueError(f"{name} must lie in [0, 2^32), got {value}")
    where = torch.device("cpu" if device is None else device) if out is None else _checked_out(out, shape, device)
    keys = sample_keys(seed, index, shape[0], where)
    if traced(keys, *(() if out is None else (out,))):
        if out is None:
            return normals(shape, keys, step, stream, where, backend)
        if transformed():  # which know no op that writes
            return out.copy_(normals(shape, keys, step, stream, where, backend))
        torch.ops.fastsample.randn_out(out, keys, step, stream, backend)
        return out
    if out is None:
        return normals(shape, keys, step, stream, where, backend)
    _fill_any(out, keys, step, stream, backend)
    mark_written(out)
    return out


def normals(
    shape: torch.Size, keys: Tensor, step: int, stream: int, device: torch.device, backend: str | None = None
) -> Tensor:
    """`randn` of these keys in fresh memory, with everything checked beforehand."""
    if traced(keys):
        if torch._C._get_tracing_state() is not None:  # torch.jit.trace takes it as a constant
            with outside():
                return _drawn(torch.Size([int(size) for size in shape]), keys, step, stream, device, backend)
        return torch.ops.fastsample.randn(keys, shape[1:], step, stream, device, backend)
    return _drawn(shape, keys, step, stream, device, backend)


def _drawn(
    shape: torch.Size, keys: Tensor, step: int, stream: int, device: torch.device, backend: str | None
) -> Tensor:
    result = fresh(shape, torch.float32, device)
    _fill(result, keys, step, stream, backend)
    return result


def _checked_out(out: Tensor, shape: torch.Size, device: torch.device | str | None) -> torch.device:
    if not isinstance(out, Tensor) or out.dtype != torch.float32:
        raise TypeError(f"out must be a float32 tensor, got {getattr(out, 'dtype', type(out).__name__)}")
    check_written("out", out)
    if out.shape != shape:
        raise ValueError(f"out must have shape {tuple(shape)}, got {tuple(out.shape)}")
    if device is not None and out.device != torch.empty(0, device=device).device:
        raise ValueError(f"out lies on {out.device}, device is {device}")
    return out.device


def _fill_any(out: Tensor, keys: Tensor, step: int, stream: int, backend: str | None) -> None:
    """fill into memory of any strides."""
    if out.is_contiguous() and not out.is_neg():
        _fill(out, keys, step, stream, backend)
    else:
        result = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        _fill(result, keys, step, stream, backend)
        out.copy_(result)


@torch.library.custom_op("fastsample::randn", mutates_args=())
def _randn(
    keys: Tensor, shape: Sequence[int], step: int, stream: int, device: torch.device, backend: str | None
) -> Tensor:
    return _drawn(torch.Size((len(keys), *shape)), keys, step, stream, device, backend)


@_randn.register_fake
def _shape(keys: Tensor, shape: Sequence[int], step: int, stream: int, device: torch.device, *_: object) -> Tensor:
    return keys.new_empty((keys.shape[0], *shape), dtype=torch.float32, device=device)


@torch.library.custom_op("fastsample::randn_out", mutates_args=("out",))
def _randn_out(out: Tensor, keys: Tensor, step: int, stream: int, backend: str | None) -> None:
    _fill_any(out, keys, step, stream, backend)


def fill(result: Tensor, keys: Tensor, step: int, stream: int, backend: str | None = None) -> None:
    """`randn` into contiguous memory, with everything checked beforehand; `keys` as sample_keys makes them."""
    if traced(result, keys):
        result.copy_(normals(result.shape, keys, step, stream, result.device, backend))
    else:
        _fill(result, keys, step, stream, backend)


def _fill(result: Tensor, keys: Tensor, step: int, stream: int, backend: str | None) -> None:
    chosen = choose(backend, result.device, native=True)
    keys = keys if keys.device == result.device else keys.to(result.device)
    batch = result.shape[0]
    size = result.numel() // batch
    if chosen == "cpu":
        to, of_keys = address("out", result), address("seed", keys)
        cpu_module().randn(to, batch, size, of_keys, step, stream, torch.get_num_threads())
    elif chosen == "cuda":
        index, current = place(result.device)
        to, of_keys = address("out", result), address("seed", keys)
        cuda_module().randn(to, batch, size, of_keys, step, stream, current, index)
    elif chosen == "triton":
        from fastsample.kernels import noise as kernel

        kernel.randn(result, keys, step, stream)
    else:
        # Apple's GPUs have no float64, in which the reference rounds.
        drawn_on = torch.device("cpu") if result.device.type == "mps" else result.device
        result.copy_(randn_reference(result.shape, keys.to(drawn_on), step, stream))


def as_int(name: str, value: SupportsIndex) -> int:
    """The value as an int; one that Dynamo traces stays open, which operator.index would tie down."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return integer(name, value)


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
