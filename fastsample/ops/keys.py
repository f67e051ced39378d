"""Which Philox key a sample draws its noise from: a hash of a seed and of a place in the set that the seed names."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from fastsample.ops.backend import cpu_module, recorded

Seed = int | Sequence[int] | Tensor
Index = int | Sequence[int] | Tensor

_WRAP = 2**64


def sample_keys(seed: Seed | None, index: Index, batch: int, device: torch.device) -> Tensor:
    """One key per sample, int64 of shape (batch,) on `device`: key(seed, index + i) for sample i.

        key(seed, place) = mix(mix(seed) + place) modulo 2^64,  mix the finaliser of splitmix64 (Steele et al. 2014)

    mix is a bijection, so two places of one seed never share a key. Keys of two seeds are equal as often as random
    64-bit numbers are.

    Args:
        seed: an int, which names the set of samples that all of these are of; or one per sample, a sequence or an
            integer tensor; taken modulo 2^64. None draws one from torch's default generator.
        index: the place of the first sample, or of every sample where the seeds are one per sample; or one per sample.
            At least 0.

    On a GPU nothing waits: seeds and places that lie there are hashed there, and so are ints.

    Raises:
        ValueError: for another number of seeds or places than of samples, and for an index below 0. TypeError: for what
            is no integer.
    """
    tensors = [one for one in (seed, index) if isinstance(one, Tensor)]
    if not recorded(*tensors):
        cpu = cpu_module()
        if cpu is not None and device.type == "cpu" and isinstance(seed, int | None) and isinstance(index, int):
            keys = torch.empty(batch, dtype=torch.int64, device="cpu")
            renew_keys(keys, seed, index)
            return keys
    seeds, shared = _per_sample("seed", fresh_seed() if seed is None else seed, batch, device)
    first, counts_up = _per_sample("index", index, batch, device)
    places = first + torch.arange(batch, device=device) if shared and counts_up else first
    return _mixed(_mixed(seeds) + places).expand(batch).contiguous()


def renew_keys(keys: Tensor, seed: Seed | None, index: Index) -> None:
    """sample_keys into contiguous memory."""
    cpu = cpu_module()
    if cpu is None or not keys.is_cpu or not isinstance(seed, int | None) or not isinstance(index, int):
        keys.copy_(sample_keys(seed, index, len(keys), keys.device))
        return
    seed = _integer("seed", fresh_seed() if seed is None else seed)
    cpu.sample_keys(keys.data_ptr(), keys.numel(), seed % _WRAP, _integer("index", index))


def fresh_seed() -> int | Tensor:
    """A seed from torch's default generator on the CPU, so that torch.manual_seed governs it; a tensor where traced."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")
    return drawn if recorded(drawn) else int(drawn)


def _per_sample(name: str, given: Seed, batch: int, device: torch.device) -> tuple[Tensor, bool]:
    """The integers as int64 on `device`, modulo 2^64, and whether they are one for all samples."""
    if isinstance(given, Tensor):
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"{name} must be an int or one per sample, integers all of them; got {given.dtype}")
        values = given.to(device, torch.int64)
    elif isinstance(given, Iterable) and getattr(given, "ndim", 1):
        listed = [_wrapped(_integer(name, one)) for one in given]
        values = torch.tensor(listed, dtype=torch.int64, device=device)
    else:
        values = torch.zeros((), dtype=torch.int64, device=device) + _wrapped(_integer(name, given))
    if values.shape not in ((), (batch,)):
        raise ValueError(f"{name} must be one int or {batch}, one per sample; got shape {tuple(values.shape)}")
    if name == "index" and isinstance(given, Tensor) and given.is_cpu and not recorded(given) and (given < 0).any():
        raise ValueError(f"index must be at least 0, got {given.min()}")
    return values, values.ndim == 0


def _mixed(value: Tensor) -> Tensor:
    """splitmix64's finaliser, a bijection of 64-bit numbers, on int64 in two's complement."""
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    return value >> bits & 2 ** (64 - bits) - 1  # int64 shifts its sign in


def _signed(value: int) -> int:
    return value - _WRAP if value >= 2**63 else value


def _wrapped(value: int) -> int:
    return value if -(2**63) <= value < 2**63 else _signed(value % _WRAP)


def _integer(name: str, value: SupportsIndex) -> int:
    # One that Dynamo traces stays open, which operator.index would tie down.
    if not isinstance(value, int) or isinstance(value, bool):
        try:
            value = operator.index(None if isinstance(value, bool) else value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{name} must be an int or one per sample, got {value!r}") from None
    if name == "index" and not 0 <= value < _WRAP:
        raise ValueError(f"index must lie in [0, 2^64), got {value}")
    return value
