"""Which module of a tree an entry of a LoRA file means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from fastsample.lora.files.aliases import Aliases
from fastsample.lora.files.formats import Entry, Left
from fastsample.lora.files.original.family import Part
from fastsample.lora.files.pieces import Piece, joined, overlapping, pieces_of, product
from fastsample.lora.files.refused import UnfitError, first_few
from fastsample.lora.files.shapes import size_of

__all__ = ["Resolution", "resolve"]

_NO_MODULE = "names no submodule"
# Two ways to write one product in half precision differ by less.
_SAME = 1e-2


@dataclass(frozen=True, eq=False)
class Resolution:
    """A file's entries, sorted by whether a module has the submodule that they name.

    Attributes:
        entries: by the name of the submodule, down and up in the shapes that fit it.
        unmatched: what cannot be attached, by its key in the file: why.
        elsewhere: what this module does not need, by its key: entries for other components, say a text encoder's where
            the module is a UNet, and those that only repeat others.
    """

    entries: dict[str, Entry]
    unmatched: dict[str, str]
    elsewhere: dict[str, str]


@dataclass(eq=False)
class _Hit:
    """An entry and the layers that it names.

    Attributes:
        key, component: the entry's.
        entry: see above.
        parts: of the layers, none where it names nothing.
        pieces: by the name of the layer, none where the entry does not fit.
        reason: why it does not.
    """

    entry: Entry
    parts: tuple[Part, ...]
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    reason: str = ""

    @property
    def key(self) -> str:
        return self.entry.key

    @property
    def component(self) -> str:
        return self.entry.component


def resolve(module: nn.Module, entries: Iterable[Entry], left: Iterable[Left] = ()) -> Resolution:
    """Finds the submodule that each entry means, by the module's own names and its authors'.

    A path with dots names a submodule exactly, one by kohya by the submodule's name with "_" for ".". Tried in order:
    the file's key as it is, the path below its component, the path alone; with and without the level "text_model" of
    CLIP. `Aliases` has the names.

    Components of which nothing resolves are elsewhere if another component does. Two text encoders name the same
    modules: the one of which more entries fit the module is meant.

    Args:
        module: any torch module.
        entries: a file's pairs.
        left: what else it holds.

    Raises:
        TypeError: module is no torch module.
        ValueError: two components fit the module equally well.

    Example:
        >>> from fastsample.lora.files.formats import read
        >>> file = read({"0.lora_A.weight": torch.ones(2, 3), "0.lora_B.weight": torch.ones(5, 2)})
        >>> found = resolve(nn.Sequential(nn.Linear(3, 5)), file.entries)
        >>> list(found.entries), found.unmatched
        (['0'], {})
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch module, got {type(module).__name__}")
    aliases = Aliases(module)
    found = [_hit(entry, aliases) for entry in entries]
    hits: dict[str, list[_Hit]] = {}
    for hit in found:
        if hit.parts:
            hits.setdefault(hit.component, []).append(hit)
    meant = _meant(hits)
    unmatched: dict[str, str] = {}
    elsewhere: dict[str, str] = {}
    fitting = []
    is_encoder = any(hit.parts and _of_an_encoder(hit) for hit in found)
    rest: list[_Hit | Left] = [*found, *left]
    for one in rest:
        component = one.component or ("text_encoder" if _of_an_encoder(one) else "")
        if _foreign(component, [*meant, "text_encoder"] if is_encoder else meant):
            elsewhere[one.key] = f"belongs to {component}"
        elif isinstance(one, _Hit) and one.pieces:
            fitting.append(one)
        else:
            unmatched[one.key] = one.reason
    return Resolution(_joined(fitting, aliases, unmatched, elsewhere), unmatched, elsewhere)


def _of_an_encoder(one: _Hit | Left) -> bool:
    """Whether a name without component is one that all of CLIP's layers have."""
    path = one.entry.path if isinstance(one, _Hit) else one.key
    return not one.component and path.startswith(("text_model.", "text_model_"))


def _foreign(component: str, meant: list[str]) -> bool:
    """Whether a component is another than the module's."""
    if not meant or not component or component in meant:
        return False
    # A file that does not say so of all its keys may mean one denoiser.
    return not (meant == [""] and component in ("unet", "transformer"))


def _hit(entry: Entry, aliases: Aliases) -> _Hit:
    parts: tuple[Part, ...] = ()
    try:
        parts = _find(entry, aliases)
        return _Hit(entry, parts, pieces_of(entry, parts, aliases.modules))
    except UnfitError as error:
        return _Hit(entry, parts, reason=str(error))


def _find(entry: Entry, aliases: Aliases) -> tuple[Part, ...]:
    """The layers that an entry names: the first linears or convolutions among the candidates, else the first of any
    type.

    Raises:
        UnfitError: the name has several meanings, or none.
    """
    first: tuple[Part, ...] = ()
    for candidate in _candidates(entry):
        found = aliases.find_flat(candidate) if entry.flat else aliases.find(candidate)
        if len(found) > 1:
            raise UnfitError(f"may mean {' or '.join(parts[0].module for parts in found)}")
        if found and aliases.sized(found[0]):
            return found[0]
        if found and not first:
            first = found[0]
    if not first:
        raise UnfitError(_NO_MODULE)
    return first


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


def _meant(hits: dict[str, list[_Hit]]) -> list[str]:
    """The components that the module has; where several name the same submodules, the one that fits best."""
    fitting = {component: sum(bool(hit.pieces) for hit in own) for component, own in hits.items()}
    layers = {component: {part.module for hit in own for part in hit.parts} for component, own in hits.items()}
    meant: list[str] = []
    for component in sorted(hits, key=lambda c: -fitting[c]):
        rivals = [c for c in meant if c and component and layers[component] & layers[c]]
        if not rivals:
            meant.append(component)
        elif fitting[component] == fitting[rivals[0]]:
            raise ValueError(
                f"entries of {rivals[0]} and {component} fit the module equally well: "
                f"{hits[rivals[0]][0].key}, {hits[component][0].key}; pass a state dict of one's entries"
            )
    return meant


def _joined(
    hits: list[_Hit], aliases: Aliases, unmatched: dict[str, str], elsewhere: dict[str, str]
) -> dict[str, Entry]:
    """One entry for each layer; entries that clash with others or repeat them are sorted out."""
    hits_of: dict[str, list[_Hit]] = {}
    for hit in hits:
        for name in hit.pieces:
            hits_of.setdefault(name, []).append(hit)
    outputs = {name: (size_of(aliases.modules[name]) or (0,))[0] for name in hits_of}
    out = {hit for hit in hits if _repeats(hit, hits_of, outputs, unmatched, elsewhere)}
    clashing: set[_Hit] = set()
    for name, own in hits_of.items():
        own[:] = [hit for hit in own if hit not in out]
        if overlapping([piece for hit in own for piece in hit.pieces[name]], outputs[name]):
            unmatched |= {hit.key: f"{first_few(h.key for h in own)} all name {name}" for hit in own}
            clashing |= {*own}
    return {
        name: joined(pieces, outputs[name])
        for name, own in hits_of.items()
        if (pieces := [piece for hit in own if hit not in clashing for piece in hit.pieces[name]])
    }


def _repeats(
    hit: _Hit,
    hits_of: dict[str, list[_Hit]],
    outputs: dict[str, int],
    unmatched: dict[str, str],
    elsewhere: dict[str, str],
) -> bool:
    """Whether an entry is of several layers that each have one of their own, and says so where it is put."""
    single = {name: [one for one in hits_of[name] if len(one.pieces) == 1] for name in hit.pieces}
    if len(hit.pieces) < 2 or not all(len(own) == 1 for own in single.values()):
        return False
    keys = first_few(own[0].key for own in single.values())
    for name, [one] in single.items():
        mine, theirs = (product(which.pieces[name], outputs[name]) for which in (hit, one))
        if (mine - theirs).abs().max() > _SAME * theirs.abs().max():
            unmatched[hit.key] = f"says another thing than {keys} of the same layers"
            return True
    elsewhere[hit.key] = f"repeats {keys}"
    return True
