"""The low-rank factors of an adapter in one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastsample.ops.lora.adapters import LowRank

Pair = tuple[Tensor, Tensor]


class Layer(Protocol):
    """A linear or a convolution."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _parameters: dict[str, nn.Parameter | None]


class Part(NamedTuple):
    """An adapter's factors in one layer: adds factor * up @ down to its weight. Zeros fill the rank up to capacity."""

    down: Tensor
    up: Tensor
    factor: float
    capacity: int


def check_ranks(parts: Sequence[Part | None]) -> None:
    for i, part in enumerate(parts):
        if part is not None and len(part.down) > part.capacity:
            raise ValueError(f"pairs[{i}] has rank {len(part.down)}, capacity is {part.capacity}")


def low_rank(part: Part, weight: float, layer: Layer) -> LowRank:
    """The factors in the layer's dtype and the rank they have room for: a swap then changes no shape and no dtype."""
    down, up = part.down.to(layer.weight), part.up.to(layer.weight)
    if missing := part.capacity - len(down):
        down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
        up = torch.cat([up, up.new_zeros(up.shape[0], missing, *up.shape[2:])], 1)
    dtype = torch.promote_types(down.dtype, torch.float32)
    return LowRank(down, up, torch.full((part.capacity,), weight * part.factor, dtype=dtype, device=down.device))


def stacked(own: Sequence[LowRank | None]) -> LowRank | None:
    present = [one for one in own if one is not None]
    if len(present) < 2:
        return present[0] if present else None
    return LowRank(
        torch.cat([one.down for one in present]),
        torch.cat([one.up for one in present], 1),
        torch.cat([one.scale for one in present]),
    )


def merged(weight: Tensor, one: LowRank | None) -> Tensor:
    if one is None:
        return weight
    up = one.up.flatten(1).to(one.scale) * one.scale
    return (weight.to(one.scale) + (up @ one.down.flatten(1).to(one.scale)).reshape(weight.shape)).to(weight.dtype)
