"""Which module of a tree an entry of a LoRA file means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fastsample.lora.files.formats import Entry
from fastsample.lora.files.refused import first_few
from fastsample.lora.files.sgm import sgm_names

__all__ = ["Resolution", "resolve"]


@dataclass(frozen=True, eq=False)
class Resolution:
    """A file's entries, sorted by whether a module has the submodule that they name.

    Attributes:
        entries: by the name of the submodule, down and up in the shapes that fit it.
        unmatched: keys of the entries that name no submodule.
        elsewhere: keys of the entries for other components, say a text encoder's where the module is a UNet.
    """

    entries: dict[str, Entry]
    unmatched: list[str]
    elsewhere: list[str]


def resolve(module: nn.Module, entries: Iterable[Entry]) -> Resolution:
    """Finds the submodule that each entry means, by the module's own names.

    A path with dots names a submodule exactly, one by kohya by the submodule's name with "_" for ".". Tried in order:
    the file's key as it is, the path below its component, the path alone; with and without the level "text_model" of
    CLIP; and, in a diffusers UNet, the names of the original UNet's blocks ("input_blocks.4.1...").

    Components of which nothing resolves are elsewhere if another component does. Two text encoders name the same
    modules: the one of which more entries fit the module is meant.

    Raises:
        TypeError: module is no torch module.
        ValueError: entries that do not fit their module ("for another model?"), that name something other than a linear
            or 2-D convolution, of which two name the same submodule, or of which one may mean two.

    Example:
        >>> from fastsample.lora.files.formats import read
        >>> net = nn.Sequential(nn.Linear(3, 5))
        >>> found = resolve(net, read({"0.lora_A.weight": torch.ones(2, 3), "0.lora_B.weight": torch.ones(5, 2)}))
        >>> list(found.entries), found.unmatched
        (['0'], [])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch module, got {type(module).__name__}")
    tree = _Tree(module)
    named: dict[str, list[tuple[Entry, str | None]]] = {}
    for entry in entries:
        named.setdefault(entry.component, []).append((entry, tree.find(entry)))
    hits = {
        component: [(entry, name) for entry, name in pairs if name is not None] for component, pairs in named.items()
    }
    meant = _meant({component: own_hits for component, own_hits in hits.items() if own_hits}, tree)
    unmatched, elsewhere = [], []
    for component, pairs in named.items():
        if meant and component and component not in meant:
            elsewhere += [entry.key for entry, _ in pairs]
        else:
            unmatched += [entry.key for entry, name in pairs if name is None]
    return Resolution(_fitted([hit for component in meant for hit in hits[component]], tree), unmatched, elsewhere)


class _Tree:
    """A module's names, as files may write them."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = dict(module.named_modules())
        # torch.compile's wrapper is not part of a name.
        self._names = {name.replace("_orig_mod.", ""): name for name in self.modules if name}
        for alias, name in sgm_names(module):
            self._names.setdefault(alias, name)
        self._flat: dict[str, list[str]] = {}
        for alias, name in self._names.items():
            self._flat.setdefault(alias.replace(".", "_"), []).append(name)

    def find(self, entry: Entry) -> str | None:
        """The submodule's name: the first linear or convolution among the candidates, else the first of any type."""
        hits = [name for candidate in _candidates(entry) for name in self._named(candidate, entry)]
        return next((name for name in hits if _size(self.modules[name])), hits[0] if hits else None)

    def _named(self, candidate: str, entry: Entry) -> list[str]:
        if not entry.flat:
            return [self._names[candidate]] if candidate in self._names else []
        names = self._flat.get(candidate.replace(".", "_"), [])
        sized = [name for name in names if _size(self.modules[name])]
        if len(sized) > 1:
            raise ValueError(f"{entry.key} may mean {' or '.join(sized)}")
        return sized or names[:1]


def _candidates(entry: Entry) -> Iterator[str]:
    level = f"text_model{'_' if entry.flat else '.'}"
    path = entry.path
    other = path.removeprefix(level) if path.startswith(level) else level + path
    yield entry.key
    if entry.component:
        yield f"{entry.component}.{path}"
        yield f"{entry.component}.{other}"
    yield path
    yield other
    # A ModuleList, the linear and a dropout, that some files name by itself.
    if path.endswith("to_out"):
        yield f"{path}.0"


def _meant(hits: dict[str, list[tuple[Entry, str]]], tree: _Tree) -> list[str]:
    """The components that the module has; where several name the same submodules, the one that fits best."""
    fitting = {c: sum(not isinstance(_fit(tree, *hit), str) for hit in own_hits) for c, own_hits in hits.items()}
    meant: list[str] = []
    for component in sorted(hits, key=lambda c: -fitting[c]):
        names = {name for _, name in hits[component]}
        rivals = [c for c in meant if c and component and names & {name for _, name in hits[c]}]
        if not rivals:
            meant.append(component)
        elif fitting[component] == fitting[rivals[0]]:
            raise ValueError(
                f"entries of {rivals[0]} and {component} fit the module equally well: "
                f"{hits[rivals[0]][0][0].key}, {hits[component][0][0].key}; pass a state dict of one's entries"
            )
    return meant


def _fitted(hits: list[tuple[Entry, str]], tree: _Tree) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    keys: dict[str, str] = {}
    problems = []
    for entry, name in hits:
        if name in keys:
            raise ValueError(f"{keys[name]} and {entry.key} both name {name}")
        keys[name] = entry.key
        fitted = _fit(tree, entry, name)
        if isinstance(fitted, str):
            problems.append(f"{entry.key}: {fitted}")
        else:
            entries[name] = fitted
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(hits)} entries do not fit the module, is the file for another model? "
            f"{first_few(problems)}"
        )
    return entries


def _size(module: Any) -> tuple[int, ...] | None:
    """(out, in) of a linear, (out, in, kh, kw) of a 2-D convolution, None of anything else.

    Attributes tell, not types: a module that replaced a linear or a convolution has the attributes of that one.
    """
    if isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return int(module.out_features), int(module.in_features)
    if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.Conv2d):
        return None
    if hasattr(module, "in_channels") and hasattr(module, "out_channels") and hasattr(module, "kernel_size"):
        return int(module.out_channels), int(module.in_channels), *module.kernel_size
    return None


def _fit(tree: _Tree, entry: Entry, name: str) -> Entry | str:
    """The entry with its factors in the module's shapes, or why they do not fit."""
    module = tree.modules[name]
    size = _size(module)
    if size is None:
        return f"{name} is a {type(module).__name__}, neither a linear nor a 2-D convolution"
    # MultiheadAttention reads the weight of this linear itself: an adapted layer in its place would never be called.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"{name} belongs to a MultiheadAttention, which does not call it"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"{name} is a convolution of {module.groups} groups"
    down, up = entry.down, entry.up
    if len(size) == 2 and down.ndim == 4 and down.shape[2:] == (1, 1):
        down, up = down[:, :, 0, 0], up[:, :, 0, 0]
    elif len(size) == 4 and size[2:] == (1, 1) and down.ndim == 2:
        down, up = down[:, :, None, None], up[:, :, None, None]
    if tuple(down.shape[1:]) != size[1:] or up.shape[0] != size[0]:
        return (
            f"factors {tuple(entry.down.shape)} and {tuple(entry.up.shape)} for the {type(module).__name__} {name}, "
            f"whose weight is {size}"
        )
    return entry if down is entry.down else replace(entry, down=down, up=up)
