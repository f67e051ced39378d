"""What a conditional model is told beside x and t: a set of examples, some of which every batch draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsample.distill.digests import bytes_of
from fastsample.loop.guidance import Shared


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

    def at(self, index: Tensor, device: torch.device) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """(cond, uncond) of these examples, int64 (B,), on a device; uncond is None where none was given."""
        chosen = index.tolist()
        cond, uncond = (
            None if keywords is None else {name: _picked(value, chosen, device) for name, value in keywords.items()}
            for keywords in (self.cond, self.uncond)
        )
        return cond or {}, uncond

    def digest(self) -> str:
        """A hash of all tensors and texts, to tell sets apart."""
        sha = hashlib.sha256()
        for keywords in (self.cond, self.uncond or {}):
            for path, values in _examples(keywords, ""):
                sha.update(path.encode())
                for value in values if isinstance(values, list) else [values]:
                    sha.update(bytes_of(value) if isinstance(value, Tensor) else repr(value).encode())
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


def _picked(value: Any, chosen: list[int], device: torch.device) -> Any:
    if isinstance(value, Shared):
        return Shared(value.value.to(device)) if isinstance(value.value, Tensor) else value
    if isinstance(value, list):
        return [value[i if len(value) > 1 else 0] for i in chosen]
    if isinstance(value, Tensor) and value.ndim:
        places = chosen if len(value) > 1 else [0] * len(chosen)
        return value[torch.tensor(places, device=value.device)].to(device)
    if isinstance(value, Mapping):
        return {name: _picked(entry, chosen, device) for name, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(_picked(entry, chosen, device) for entry in value)
    return value
