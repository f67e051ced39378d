"""A model in calls of one size, so that a sample does not depend on how many are drawn with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastsample.model import unwrapped


class Slices:
    """Places `first` .. `first + count - 1` of a set, in slices of `size` that begin at its multiples.

    Convolutions and matrix products may round differently by the size of a batch, and by the place in it. Here place i
    is always entry i mod size of a call for exactly `size` samples. What is missing of a slice is filled with copies.
    """

    def __init__(self, first: int, count: int, size: int) -> None:
        self.count, self._size, self._before = count, size, first % size

    def __call__(self, function: Callable[..., Tensor], batch: Tensor, *others: Any, **keywords: Any) -> Tensor:
        """The function of a batch and what goes with it, joined from its slices.

        Args:
            function: of a batch, others and keywords, returns a tensor with an entry for each of the batch.
            batch: `count` samples, or two or more times as many: guidance puts both its halves into one batch.
            others, keywords: tensors with an entry for each of the batch are cut alike; all else is passed as it is.
        """
        rows = len(batch)
        made = []
        for start in range(0, rows, self.count):
            for wanted, kept in self._of_half(start, batch.device):
                part = _taken(wanted, rows)
                found = function(part(batch), *map(part, others), **{name: part(v) for name, v in keywords.items()})
                made.append(found[kept])
        return torch.cat(made)

    def _of_half(self, start: int, device: torch.device) -> Iterator[tuple[Tensor | slice, slice]]:
        """(rows of the batch, which of the results are theirs) of every slice."""
        size, before = self._size, self._before
        for place in range(0, before + self.count, size):
            low, high = max(0, place - before), min(self.count, place - before + size)
            skipped = low - (place - before)
            if high - low == size:
                yield slice(start + low, start + high), slice(None)
                continue
            rows = torch.arange(place - before, place - before + size, device=device).clamp(low, high - 1)
            yield rows + start, slice(skipped, skipped + high - low)


def _taken(wanted: Tensor | slice, rows: int) -> Callable[[Any], Any]:
    def part(value: Any) -> Any:
        is_per_sample = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
        return value[wanted] if is_per_sample else value

    return part


class SlicedModel:
    """A model that samplers call, in slices."""

    def __init__(self, model: Callable[..., Any], slices: Slices) -> None:
        self._model, self._slices = model, slices

    def __call__(self, x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        """The model's output for all of x."""
        return self._slices(self._output, x, t, **keywords)

    def _output(self, x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        output: Tensor = unwrapped(self._model(x, t, **keywords))
        return output
