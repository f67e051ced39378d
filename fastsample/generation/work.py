"""What every process needs to make chunks of a set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastsample.generation.folder import Folder
from fastsample.generation.named import named_model
from fastsample.generation.recipe import Recipe
from fastsample.generation.source import Source


def source_of(model: Any, recipe: Recipe, device: str | None) -> Source:
    """What draws this recipe."""
    found, autoencoder = named_model(model) if isinstance(model, str) else (model, None)
    return Source(recipe, found, autoencoder, device)


def folder_of(path: Path, recipe: Recipe, source: Source) -> Folder:
    """The set that this recipe and source make."""
    return Folder(path, {"recipe": recipe.as_json(), **source.identity()})


def bar_of(recipe: Recipe, chunks: Sequence[int], shown: bool) -> Any:
    """A progress bar for a set of which these chunks are still to be made."""
    there = recipe.num - sum(len(recipe.places(number)) for number in chunks)
    return tqdm(total=recipe.num, initial=there, unit=" images", disable=not shown)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets torch have so many CPU threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
