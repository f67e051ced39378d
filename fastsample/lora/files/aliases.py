"""All the names by which files may mean a module's layers."""

from __future__ import annotations

from torch import nn

from fastsample.lora.files.fused import fused_parts, split_names
from fastsample.lora.files.original import original_names
from fastsample.lora.files.original.family import Part
from fastsample.lora.files.prefixes import unwrapped
from fastsample.lora.files.sgm import sgm_names
from fastsample.lora.files.shapes import size_of


class Aliases:
    """A module's names as files may write them: its own, its authors', and those of fused and single projections.

    Attributes:
        modules: the submodules by their own names.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = dict(module.named_modules())
        names: dict[str, tuple[Part, ...]] = {name: (Part(name),) for name in self.modules if name}
        for name in list(names):
            names.setdefault(unwrapped(name), names[name])
        for alias, name in sgm_names(module):
            names.setdefault(alias, (Part(name),))
        for alias, parts in (*original_names(module), *split_names(module)):
            names.setdefault(alias, parts)
        fused = fused_parts(module)
        self._names = {
            alias: tuple(_moved(part, fused[part.module]) if part.module in fused else part for part in parts)
            for alias, parts in names.items()
        }
        self._flat: dict[str, list[tuple[Part, ...]]] = {}
        for alias, parts in self._names.items():
            self._flat.setdefault(alias.replace(".", "_"), []).append(parts)

    def find(self, name: str) -> list[tuple[Part, ...]]:
        """The layers of a name with dots, one at most."""
        return [self._names[name]] if name in self._names else []

    def find_flat(self, name: str) -> list[tuple[Part, ...]]:
        """The layers of a name by kohya: several where different names of layers are one without dots."""
        found = list(dict.fromkeys(self._flat.get(name.replace(".", "_"), [])))
        return [parts for parts in found if self.sized(parts)] or found[:1]

    def sized(self, parts: tuple[Part, ...]) -> bool:
        """Whether all of them are linears or convolutions."""
        return all(size_of(self.modules[part.module]) for part in parts)


def _moved(part: Part, place: Part) -> Part:
    """A part of a single projection as one of the fused projection that runs in its place."""
    assert place.into is not None
    first, last = (place.into.start, place.into.stop) if part.into is None else (part.into.start, part.into.stop)
    offset = 0 if part.into is None else place.into.start
    return Part(place.module, range(first + offset, last + offset), part.of)
