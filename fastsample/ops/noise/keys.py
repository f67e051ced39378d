"""The Philox key of a sample's noise: a hash of a seed and of a place in the set that the seed names."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastsample.ops.backend import cpu_module
from fastsample.ops.tracing import traced

Seed = int | Sequence[int] | Tensor
Index = int | Sequence[int] | Tensor

_WRAP = 2**64


def sample_keys(seed: Seed | None, index: Index, batch: int, device: torch.device) -> Tensor:
    """One key per sample, int64 of shape (batch,) on `device`: key(seed, index + i) for sample i.

        key(seed, place) = mix(mix(seed) + place) modulo 2^64,  mix the finaliser of splitmix64 (Steele et al. 2014)

    mix is a bijection, so two places of one seed never share a key. Keys of two seeds are equal as often as random
    64-bit numbers are.

    Args:
        seed: an int, which names the set that all samples belong to; or one per sample, a sequence or an integer
            tensor; taken modulo 2^64. None draws a seed from torch's default generator.
        index: the place of the first sample, or of every sample where the seeds are one per sample; or one per sample.
            At least 0; places that lie on a GPU are not read and count modulo 2^64, as do those beyond the last.

    On a GPU nothing waits: seeds and places that lie there are hashed there, and so are ints.

    Raises:
        ValueError: for another number of seeds or places than of samples, and for an index outside [0, 2^64).
            TypeError: for seeds and places that are no integers.
    """
    tensors = [value for value in (seed, index) if isinstance(value, Tensor)]
    seen = traced(*tensors)
    if not seen:
        cpu = cpu_module()
        if cpu is not None and device.type == "cpu" and isinstance(seed, int | None) and isinstance(index, int):
            keys = torch.empty(batch, dtype=torch.int64, device="cpu")
            renew_keys(keys, seed, index)
            return keys
    places = _per_sample("index", index, batch, device)
    seeds = _per_sample("seed", fresh_seed() if seed is None else seed, batch, device)
    return torch.ops.fastsample.sample_keys(seeds, places, batch) if seen else _keys(seeds, places, batch)


def renew_keys(keys: Tensor, seed: Seed | None, index: Index) -> None:
    """sample_keys into contiguous memory."""
    cpu = cpu_module()
    if cpu is None or not keys.is_cpu or not isinstance(seed, int | None) or not isinstance(index, int):
        keys.copy_(sample_keys(seed, index, len(keys), keys.device))
        return
    first = _integer("index", index)
    name = _integer("seed", fresh_seed() if seed is None else seed)
    cpu.sample_keys(keys.data_ptr(), keys.numel(), name % _WRAP, first)


def fresh_seed() -> int | Tensor:
    """A seed from torch's default generator on the CPU, so that torch.manual_seed governs it; a tensor where traced."""
    return torch.ops.fastsample.fresh_seed(torch.ops.aten.empty([0], device="cpu")) if traced() else int(_drawn())


def _drawn() -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")


# Registered: Inductor's own integers are others, and of this range all the same. Of calls with equal arguments a graph
# keeps one, so that each has an empty tensor of its own.
@torch.library.custom_op("fastsample::fresh_seed", mutates_args=())
def _fresh_seed(unshared: Tensor) -> Tensor:
    return _drawn()


@_fresh_seed.register_fake
def _one_integer(unshared: Tensor) -> Tensor:
    return unshared.new_empty((), dtype=torch.int64)


def _keys(seeds: Tensor, places: Tensor, batch: int) -> Tensor:
    if seeds.ndim == 0 and places.ndim == 0:
        places = places + torch.arange(batch, device=places.device)
    return _mixed(_mixed(seeds) + places).expand(batch).contiguous()


# Registered: in the C++ that Inductor writes, sums and products that wrap would be undefined.
@torch.library.custom_op("fastsample::sample_keys", mutates_args=())
def _sample_keys(seeds: Tensor, places: Tensor, batch: int) -> Tensor:
    return _keys(seeds, places, batch)


@_sample_keys.register_fake
def _one_each(seeds: Tensor, places: Tensor, batch: int) -> Tensor:
    return seeds.new_empty((batch,))


def _per_sample(name: str, numbers: Seed, batch: int, device: torch.device) -> Tensor:
    """The integers as int64 on `device`, modulo 2^64: one for all samples, of shape (), or one each."""
    if isinstance(numbers, Tensor):
        values = _of_tensor(name, numbers, device)
    elif (
        isinstance(numbers, np.ndarray | Sequence)
        and not isinstance(numbers, str | bytes)
        and getattr(numbers, "ndim", None) != 0
    ):
        if any(isinstance(value, Tensor) for value in numbers):
            values = torch.stack([_per_sample(name, value, 1, device).reshape(()) for value in numbers])
        else:
            listed = [_wrapped(_integer(name, value)) for value in numbers]
            values = torch.tensor(listed, dtype=torch.int64, device=device)
    else:
        values = torch.zeros((), dtype=torch.int64, device=device) + _wrapped(_integer(name, numbers))
    if values.shape not in ((), (batch,)):
        raise ValueError(f"{name} must be one int or {batch}, one per sample; got shape {tuple(values.shape)}")
    return values


def _of_tensor(name: str, tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be an int or one per sample, integers all of them; got {tensor.dtype}")
    if not traced(tensor):
        if tensor.is_meta and device.type != "meta":
            raise ValueError(f"{name} lies on meta, where there are no values")
        if name == "index" and tensor.is_cpu and tensor.dtype.is_signed and (tensor < 0).any():
            raise ValueError(f"index must be at least 0, got {tensor.min()}")
    return tensor.to(device, torch.int64)


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
    # Under tracing operator.index fixes an int beyond int64 in the graph, which could not have it as an input.
    return value if -(2**63) <= value < 2**63 else _signed(operator.index(value) % _WRAP)


def _integer(name: str, value: object) -> int:
    # An int that Dynamo traces stays an input of the graph; operator.index would fix its value there.
    if not isinstance(value, int) or isinstance(value, bool):
        try:
            value = operator.index(None if isinstance(value, bool) else value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{name} must be an int or one per sample, got {value!r}") from None
    if name == "index" and not 0 <= value < _WRAP:
        raise ValueError(f"index must lie in [0, 2^64), got {value}")
    return value
