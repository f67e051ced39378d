"""Standard normals that depend on key, position, step and stream alone: Philox4x32-10 and Box-Muller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor
from typing_extensions import Never

from fastsample.checks import checked_shape, integer, usable_device
from fastsample.hints import answering, no_such_argument
from fastsample.ops.address import check_written
from fastsample.ops.backend import Backend
from fastsample.ops.memory import mark_written
from fastsample.ops.noise.compiled import traced_fill, traced_normals
from fastsample.ops.noise.keys import Index, Seed, sample_keys
from fastsample.ops.noise.launch import drawn, fill_contiguous, fill_strided
from fastsample.ops.tracing import traced, transformed

INITIAL, STEP = 0, 1  # streams: x_T, and the noise that samplers add; never shared


@answering
def randn(
    shape: Sequence[int],
    *,
    seed: Seed | None = None,
    index: Index = 0,
    step: int = 0,
    stream: int = INITIAL,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: Backend | None = None,
    **unknown: Never,
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
    if unknown:
        raise no_such_argument(randn, unknown)
    shape = checked_shape("shape", shape)
    for name, value in (("step", step), ("stream", stream)):
        if not 0 <= as_int(name, value) < 2**32:
            raise ValueError(f"{name} must lie in [0, 2^32), got {value}")
    place = torch.device("cpu") if device is None else usable_device(device, or_meta=True)
    where = place if out is None else _checked_out(out, shape, None if device is None else place)
    keys = sample_keys(seed, index, shape[0], where)
    if traced(keys, *(() if out is None else (out,))):
        if out is None:
            return normals(shape, keys, step, stream, where, backend)
        if transformed():  # which know no op that writes
            return out.copy_(normals(shape, keys, step, stream, where, backend))
        return traced_fill(out, keys, step, stream, backend)
    if out is None:
        return normals(shape, keys, step, stream, where, backend)
    fill_strided(out, keys, step, stream, backend)
    mark_written(out)
    return out


def normals(
    shape: torch.Size, keys: Tensor, step: int, stream: int, device: torch.device, backend: str | None = None
) -> Tensor:
    """`randn` of these keys in fresh memory, with everything checked beforehand."""
    if traced(keys):
        return traced_normals(shape, keys, step, stream, device, backend)
    return drawn(shape, keys, step, stream, device, backend)


def _checked_out(out: Tensor, shape: torch.Size, device: torch.device | None) -> torch.device:
    if not isinstance(out, Tensor) or out.dtype != torch.float32:
        raise TypeError(f"out must be a float32 tensor, got {getattr(out, 'dtype', type(out).__name__)}")
    check_written("out", out)
    if out.shape != shape:
        raise ValueError(f"out must have shape {tuple(shape)}, got {tuple(out.shape)}")
    if device is not None and out.device != torch.empty(0, device=device).device:
        raise ValueError(f"out lies on {out.device}, device is {device}")
    return out.device


def fill(result: Tensor, keys: Tensor, step: int, stream: int, backend: str | None = None) -> None:
    """`randn` into contiguous memory, with everything checked beforehand; `keys` as sample_keys makes them."""
    if traced(result, keys):
        result.copy_(normals(result.shape, keys, step, stream, result.device, backend))
    else:
        fill_contiguous(result, keys, step, stream, backend)


def as_int(name: str, value: SupportsIndex) -> int:
    """The value as an int; an int that Dynamo traces stays an input of the graph, where operator.index would fix it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return integer(name, value)
