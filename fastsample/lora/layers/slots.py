"""An adapter's factors in one layer: a pair as users give it, a slot that keeps it, a LowRank for the product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastsample.lora.checks import finite
from fastsample.ops.lora.adapters import LowRank

# A and B, as callers give them.
Pair = tuple[Tensor, Tensor]
_LARGEST = torch.finfo(torch.float32).max


class Layer(Protocol):
    """A linear or a convolution."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _parameters: dict[str, nn.Parameter | None]


def groups_of(layer: Layer) -> int:
    """The groups of a convolution, 1 of a linear."""
    groups: int = getattr(layer, "groups", 1)
    return groups


def inputs_of(layer: Layer) -> tuple[int, ...]:
    """A's shape after the rank: all inputs of the layer, of a convolution the kernel too."""
    channels, *kernel = layer.weight.shape[1:]
    return (channels * groups_of(layer), *kernel)


class Slot(NamedTuple):
    """An adapter's factors in one layer, to whose weight they add factor * up @ down.

    Attributes:
        down, up: A and B as they were given, of any dtype; in a convolution with groups B may hold each group's part
            alone, as PEFT's does.
        factor: scale * alpha / r.
        capacity: the rank that there is room for; zeros fill it up.
    """

    down: Tensor
    up: Tensor
    factor: float
    capacity: int

    def low_rank(self, weight: float, layer: Layer) -> LowRank:
        """The factors in the layer's dtype, filled up to the capacity: a swap then changes no shape and no dtype."""
        down, up = self.down.to(layer.weight), _whole(self.up, len(self.down)).to(layer.weight)
        if missing := self.capacity - len(down):
            down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
            up = torch.cat([up, up.new_zeros(up.shape[0], missing, *up.shape[2:])], 1)
        dtype = torch.promote_types(down.dtype, torch.float32)
        return LowRank(down, up, torch.full((self.capacity,), weight * self.factor, dtype=dtype, device=down.device))

    def emptied(self) -> Slot:
        """A slot of the same capacity without factors."""
        return Slot(self.down.detach()[:0], self.up.detach()[:, :0], 0.0, self.capacity)


def slots_of(
    pairs: Sequence[Pair | None],
    layers: Sequence[Layer],
    scale: float | Sequence[float],
    alpha: float | None,
) -> list[Slot | None]:
    """A slot for each layer, None where its pair is None, each with room for its own rank.

    Raises:
        ValueError, TypeError: for pairs that do not fit the layers, and numbers that are not finite.
    """
    count = len(layers)
    if not isinstance(pairs, Sequence) or len(pairs) != count:
        got = len(pairs) if isinstance(pairs, Sequence) else type(pairs).__name__
        raise ValueError(f"pairs must be a list of {count} entries, (A, B) or None for each linear; got {got}")
    scales = [finite("scale", number) for number in (scale if isinstance(scale, Sequence) else [scale] * count)]
    if alpha is not None:
        alpha = finite("alpha", alpha)
    return [
        None if pair is None else _slot(f"pairs[{i}]", pair, layer, own_scale, alpha)
        for i, (pair, layer, own_scale) in enumerate(zip(pairs, layers, scales, strict=True))
    ]


def _slot(name: str, pair: Pair, layer: Layer, scale: float, alpha: float | None) -> Slot:
    if len(pair) != 2 or not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in pair):
        raise TypeError(f"{name} must be two floating-point tensors, A and B")
    down, up = pair
    out, into, groups = layer.weight.shape[0], inputs_of(layer), groups_of(layer)
    rank = down.shape[0] if down.ndim else 0
    ones = (1,) * len(into[1:])
    ups = [(out, rank, *ones)] + ([(out, rank // groups, *ones)] if rank % groups == 0 else [])
    if not rank or tuple(down.shape) != (rank, *into) or tuple(up.shape) not in ups:
        want = f"A (r, {', '.join(map(str, into))}) and B ({', '.join(map(str, (out, 'r', *ones)))})"
        apart = f", or of each group alone with r / {groups} for r" if groups > 1 else ""
        raise ValueError(f"{name} must be {want}{apart}, got {tuple(down.shape)} and {tuple(up.shape)}")
    factor = scale * (1.0 if alpha is None else alpha / rank)
    if abs(factor) > _LARGEST:
        raise ValueError(f"scale * alpha / r of {name} is {factor:g}, more than float32 holds")
    return Slot(down, up, factor, rank)


def _whole(up: Tensor, rank: int) -> Tensor:
    """B of all outputs from all of the rank; the groups of PEFT's B read a part of the rank each."""
    own = up.shape[1]
    if own == rank:
        return up
    groups = rank // own
    parts = up.reshape(groups, -1, 1, own) * torch.eye(groups, dtype=up.dtype, device=up.device)[:, None, :, None]
    return parts.reshape(len(up), rank, *up.shape[2:])


def check_ranks(slots: Sequence[Slot | None]) -> None:
    """Raises ValueError where a rank is above its slot's capacity."""
    for i, slot in enumerate(slots):
        if slot is not None and len(slot.down) > slot.capacity:
            raise ValueError(f"pairs[{i}] has rank {len(slot.down)}, capacity is {slot.capacity}")


def stacked(low_ranks: Sequence[LowRank | None]) -> LowRank | None:
    """The sum of low-rank products as one product of all their ranks; None where all are None."""
    present = [low_rank for low_rank in low_ranks if low_rank is not None]
    if len(present) < 2:
        return present[0] if present else None
    return LowRank(
        torch.cat([low_rank.down for low_rank in present]),
        torch.cat([low_rank.up for low_rank in present], 1),
        torch.cat([low_rank.scale for low_rank in present]),
    )


def merged(weight: Tensor, low_rank: LowRank | None) -> Tensor:
    """The weight with the product of the factors added, rounded once."""
    if low_rank is None:
        return weight
    down, up, scale = low_rank
    product = (up.flatten(1).to(scale) * scale) @ down.flatten(1).to(scale)
    return (weight.to(scale) + product.reshape(weight.shape)).to(weight.dtype)
