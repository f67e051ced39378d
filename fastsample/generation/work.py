"""What every process needs to make chunks of a set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from fastsample.generation.folder import Folder
from fastsample.generation.named import named_model
from fastsample.generation.recipe import Recipe
from fastsample.generation.source import Source
from fastsample.zoo.autoencoder import Autoencoder


class Place(NamedTuple):
    """Where a set goes, and where it is computed.

    Attributes:
        out: the folder.
        device: a torch device, or None for the model's own.
        autoencoder: of a model of latents that does not bring one along; None for the model's own.
    """

    out: Path
    device: str | None = None
    autoencoder: Autoencoder | None = None


@contextmanager
def source_of(model: Any, recipe: Recipe, place: Place) -> Iterator[Source]:
    """What draws this recipe; afterwards the model is in training mode again where it was."""
    found, autoencoder = named_model(model) if isinstance(model, str) else (model, None)
    training = [module for module in found.modules() if module.training] if isinstance(found, nn.Module) else []
    try:
        yield Source(recipe, found, place.autoencoder or autoencoder, place.device)
    finally:
        for module in training:
            module.training = True


def bar_of(folder: Folder, shown: bool) -> Any:
    """A progress bar for a set."""
    return tqdm(total=folder.recipe.num, initial=folder.samples(), unit=" images", disable=not shown)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets torch have so many CPU threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
