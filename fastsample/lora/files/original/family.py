"""What a table of original names holds, and the names that it gives a model's modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import nn

from fastsample.lora.files.prefixes import unwrapped
from fastsample.lora.files.shapes import size_of


class Part(NamedTuple):
    """Where some outputs of a layer that a file names are in the model.

    Attributes:
        module: the model's own name of the layer.
        into: the layer's outputs; None all.
        of: the outputs as the file counts them; None all.
    """

    module: str
    into: range | None = None
    of: range | None = None


Named = tuple[str, tuple[Part, ...]]
# By a name with its numbers left open: what it has to match, the original name, diffusers' names.
_Rules = dict[str, list[tuple[re.Pattern[str], str, tuple[str, ...]]]]


class Family:
    """The names that a model's authors gave its layers, beside diffusers' for the same ones.

    Either may be a file's, the other the model's own.

    Args:
        diffusers: children by which diffusers' model is known.
        original: children by which the authors' is.
        names: diffusers' names by the original ones, `{}` for a number. "block: q k" are the layers block.q and
            block.k, whose outputs one after the other are the original layer's.
        swapped: original names of layers whose outputs are shift and scale where they are twice as many as the inputs;
            diffusers has the scale first.
        without: children that diffusers' model does not have.
    """

    def __init__(
        self,
        diffusers: str,
        original: str,
        names: Mapping[str, str],
        swapped: tuple[str, ...] = (),
        without: str = "",
    ) -> None:
        self.diffusers, self.original = frozenset(diffusers.split()), frozenset(original.split())
        self.names = {name: _expanded(own) for name, own in names.items()}
        self.swapped, self.without = frozenset(swapped), frozenset(without.split())

    def of(self, model: nn.Module) -> Iterator[Named]:
        """The names that files may give the layers of a model, if it is one of this family."""
        children = {unwrapped(name) for name, _ in model.named_children()}
        if self.diffusers <= children and not self.without & children:
            yield from self._original(model)
        elif self.original <= children:
            yield from self._of_diffusers(model)

    def _original(self, model: nn.Module) -> Iterator[Named]:
        layers = _layers(model)
        for name in layers:
            for pattern, original, templates in self._by_diffusers.get(_general(name), ()):
                if not (match := pattern.fullmatch(name)):
                    continue
                parts = [template.format(*match.groups()) for template in templates]
                if all(part in layers for part in parts):
                    whole = original.format(*match.groups())
                    yield whole, _split(original in self.swapped, [layers[part] for part in parts])

    def _of_diffusers(self, model: nn.Module) -> Iterator[Named]:
        for name, (path, size) in _layers(model).items():
            for pattern, original, templates in self._by_original.get(_general(name), ()):
                if not (match := pattern.fullmatch(name)):
                    continue
                if len(templates) == 1:
                    yield templates[0].format(*match.groups()), _split(original in self.swapped, [(path, size)])
                    continue
                for template, rows in zip(templates, rows_of(_sizes(size, len(templates))), strict=True):
                    yield template.format(*match.groups()), (Part(path, into=rows),)

    @cached_property
    def _by_diffusers(self) -> _Rules:
        return _indexed((own[0], name, own) for name, own in self.names.items())

    @cached_property
    def _by_original(self) -> _Rules:
        return _indexed((name, name, own) for name, own in self.names.items())


def rows_of(sizes: list[int]) -> list[range]:
    """The places of outputs that follow one another."""
    return [range(first, last) for first, last in pairwise(accumulate(sizes, initial=0))]


def _expanded(names: str) -> tuple[str, ...]:
    block, _, layers = names.partition(": ")
    return tuple(f"{block}.{layer}" for layer in layers.split()) or (names,)


def _layers(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The path and size of every linear and convolution, by its name without wrappers."""
    return {
        unwrapped(path): (path, size) for path, layer in model.named_modules() if (size := size_of(layer)) is not None
    }


def _split(swapped: bool, layers: list[tuple[str, tuple[int, ...]]]) -> tuple[Part, ...]:
    if len(layers) > 1:
        rows = rows_of([size[0] for _, size in layers])
        return tuple(Part(path, of=own) for (path, _), own in zip(layers, rows, strict=True))
    [(path, size)] = layers
    if not swapped or size[0] != 2 * size[1]:
        return (Part(path),)
    first, second = rows_of([size[0] // 2, size[0] // 2])
    return Part(path, first, second), Part(path, second, first)


def _sizes(size: tuple[int, ...], count: int) -> list[int]:
    """How many outputs each part of a fused layer has: q, k and v as many; beside an MLP as many as inputs."""
    out, into = size[:2]
    return [out // count] * count if count < 4 else [*[into] * (count - 1), out - (count - 1) * into]


def _general(name: str) -> str:
    """A name with all numbers left open."""
    return re.sub(r"(?:(?<=\.)|^)\d+(?=\.|$)", "{}", name)


def _indexed(rules: Iterable[tuple[str, str, tuple[str, ...]]]) -> _Rules:
    """Rules by the general form of the name that they are found by."""
    indexed: _Rules = {}
    for template, original, own in rules:
        pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
        indexed.setdefault(_general(template), []).append((pattern, original, own))
    return indexed
