"""One pair of factors for each layer, from the pairs of a file that stand for parts of it or for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsample.lora.files.formats import Entry
from fastsample.lora.files.original.family import Part
from fastsample.lora.files.refused import UnfitError
from fastsample.lora.files.shapes import shaped, size_of, unfit


class Piece(NamedTuple):
    """An entry's pair for some outputs of a layer.

    Attributes:
        entry: with down as the layer wants it, and the rows of up that are for these outputs.
        into: which outputs; None all.
    """

    entry: Entry
    into: range | None


def pieces_of(entry: Entry, parts: Sequence[Part], modules: Mapping[str, nn.Module]) -> dict[str, list[Piece]]:
    """What an entry gives to each layer that it stands for.

    Raises:
        UnfitError: its factors do not fit them.
    """
    pieces: dict[str, list[Piece]] = {}
    outputs = sum(_outputs(part, modules) for part in parts)
    for part in parts:
        module = modules[part.module]
        if (reason := unfit(module, part.module)) is not None:
            raise UnfitError(reason)
        size = size_of(module)
        assert size is not None
        down, up = shaped(entry.down, entry.up, size)
        # PEFT's B of a convolution with groups reads a part of the rank for each.
        ranks = (len(down), len(down) / getattr(module, "groups", 1))
        if tuple(down.shape[1:]) != size[1:] or up.shape[0] != outputs or up.shape[1] not in ranks:
            wanted = f"the {type(module).__name__} {part.module}, whose weight is {size}"
            if len(parts) > 1 or part.into:
                wanted = f"{outputs} outputs of {wanted}"
            raise UnfitError(f"factors {tuple(entry.down.shape)} and {tuple(entry.up.shape)} do not fit {wanted}")
        if part.of is not None:
            up = up[part.of.start : part.of.stop]
        fitted = entry if down is entry.down and up is entry.up else replace(entry, down=down, up=up)
        pieces.setdefault(part.module, []).append(Piece(fitted, part.into))
    return pieces


def overlapping(pieces: Sequence[Piece], outputs: int) -> bool:
    """Whether two of them are for the same output."""
    places = sorted(((piece.into or range(outputs)) for piece in pieces), key=lambda place: place.start)
    return any(first.stop > second.start for first, second in pairwise(places))


def joined(pieces: Sequence[Piece], outputs: int) -> Entry:
    """The pieces for one layer as one entry: A one below the other, B beside one another, 0 for the other outputs."""
    if len(pieces) == 1 and pieces[0].into is None:
        return pieces[0].entry
    by_key: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_key.setdefault(piece.entry.key, []).append(piece)
    factors = {piece.entry.factor for piece in pieces}
    alike = len(factors) == 1
    dtype = _dtype({tensor.dtype for piece in pieces for tensor in (piece.entry.down, piece.entry.up)}, alike)
    downs, ups = [], []
    for own in by_key.values():
        downs.append(own[0].entry.down.to(dtype))
        up = _spread(own, outputs, dtype)
        ups.append(up if alike else up * own[0].entry.factor)
    origin = "; ".join(dict.fromkeys(piece.entry.origin for piece in pieces))
    return replace(
        pieces[0].entry,
        key=", ".join(by_key),
        down=torch.cat(downs),
        up=torch.cat(ups, 1),
        factor=factors.pop() if alike else 1.0,
        origin=origin,
    )


def product(pieces: Sequence[Piece], outputs: int) -> Tensor:
    """What the pieces add to the layer's weight, in float64."""
    entry = joined(pieces, outputs)
    return entry.factor * entry.up.detach().double().flatten(1) @ entry.down.detach().double().flatten(1)


def _spread(pieces: Sequence[Piece], outputs: int, dtype: torch.dtype) -> Tensor:
    """B of all outputs of a layer."""
    rows, done = [], 0
    for place, entry in sorted(
        ((into or range(outputs), entry) for entry, into in pieces), key=lambda one: one[0].start
    ):
        up = entry.up.to(dtype)
        rows += [up.new_zeros(place.start - done, *up.shape[1:]), up]
        done = place.stop
    return torch.cat([*rows, rows[-1].new_zeros(outputs - done, *rows[-1].shape[1:])])


def _dtype(dtypes: set[torch.dtype], alike: bool) -> torch.dtype:
    """One for all factors: their own where that is one that torch computes in, and no factor has to be folded in."""
    if len(dtypes) == 1 and alike and all(dtype.itemsize > 1 for dtype in dtypes):
        return next(iter(dtypes))
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _outputs(part: Part, modules: Mapping[str, nn.Module]) -> int:
    """How many outputs of the file's layer a part stands for."""
    if part.into is not None:
        return len(part.into)
    size = size_of(modules[part.module])
    return size[0] if size else 0
