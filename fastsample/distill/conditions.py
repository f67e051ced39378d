"""What a conditional model is told beside x and t: a set of examples, some of which every batch draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsample.loop.guidance import Shared, rebuilt
from fastsample.storage.digests import bytes_of


class Conditions:
    """The keywords of a model for N examples, and those of the unconditional half of guidance.

    Args:
        cond: keywords; a tensor has an example per entry of its first axis, N of them, and so does a list. Mappings and
            tuples are gone through; all else, and what is wrapped in fastsample.Shared, is the same for all examples.
        uncond: the same keywords for no condition, with N entries or with one that serves all; None without guidance.

    Raises:
        TypeError: cond or uncond is no mapping. ValueError: tensors and lists differ in length, or are empty.
    """

    def __init__(self, cond: Mapping[str, Any] | None, uncond: Mapping[str, Any] | None) -> None:
        for name, keywords in (("cond", cond), ("uncond", uncond)):
            if not isinstance(keywords, Mapping | None):
                raise TypeError(f"{name} must be a mapping of keywords, got {type(keywords).__name__}")
        self.cond, self.uncond = dict(cond or {}), None if uncond is None else dict(uncond)
        counts = {path: len(values) for path, values in _examples(self.cond, "")}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{path} has {count}" for path, count in counts.items())
            raise ValueError(f"cond must hold as many entries of each keyword: {said}")
        self.count = min(counts.values(), default=1)
        for path, values in _examples(self.uncond or {}, ""):
            if len(values) not in (1, self.count):
                raise ValueError(f"uncond must hold one entry of {path} or {self.count}, as cond; got {len(values)}")
        if self.count == 0:
            raise ValueError("cond must not be empty")

    def at(self, index: Tensor, device: torch.device) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
        """(cond, uncond) of these examples, int64 (B,), on a device; uncond is None where none was given."""
        chosen = index.tolist()
        return _picked(self.cond, chosen, device), None if self.uncond is None else _picked(self.uncond, chosen, device)

    def digest(self) -> str:
        """A hash of all of it, to tell sets apart."""
        sha = hashlib.sha256()
        for part in _parts((self.cond, self.uncond)):
            sha.update(part)
        return sha.hexdigest()


def _examples(value: Any, path: str) -> Iterator[tuple[str, Tensor | list[Any]]]:
    """All that has an entry per example, with the path to it."""
    if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim):
        yield path, value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _examples(entry, f"{path}.{name}" if path else str(name))
    elif isinstance(value, tuple):
        for i, entry in enumerate(value):
            yield from _examples(entry, f"{path}[{i}]")


def _picked(value: Any, chosen: list[int] | None, device: torch.device) -> Any:
    """The value for the chosen examples, on a device; for None all of it, as in a Shared."""
    if isinstance(value, Shared):
        return Shared(_picked(value.value, None, device))
    if isinstance(value, list):
        every = value if chosen is None else [value[i if len(value) > 1 else 0] for i in chosen]
        return [_picked(entry, None, device) for entry in every]
    if isinstance(value, Tensor):
        if chosen is not None and value.ndim:
            places = chosen if len(value) > 1 else [0] * len(chosen)
            value = value[torch.tensor(places, device=value.device)]
        return value.to(device)
    if isinstance(value, Mapping):
        return rebuilt(value, {name: _picked(entry, chosen, device) for name, entry in value.items()})
    if isinstance(value, tuple):
        entries = (_picked(entry, chosen, device) for entry in value)
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def _parts(value: Any) -> Iterator[bytes]:
    """The bytes of all that a value holds, and of what it is."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield bytes_of(value)
    elif isinstance(value, Shared):
        yield b"shared"
        yield from _parts(value.value)
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield str(name).encode()
            yield from _parts(entry)
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__}{len(value)}".encode()
        for entry in value:
            yield from _parts(entry)
    else:
        # The address that the text of some objects holds changes from run to run: their kind must do.
        plain = isinstance(value, str | bytes | int | float | complex | None)
        yield (repr(value) if plain else type(value).__qualname__).encode()
