"""The chunks of a set by this process, or by those that torchrun has started."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from typing import Any

import torch

from fastsample.generation.crew import Crew, crew_of_this_run
from fastsample.generation.folder import Folder
from fastsample.generation.recipe import Recipe
from fastsample.generation.work import Place, bar_of, source_of

_PAUSE, _LOOK = 0.1, 0.5  # seconds


def with_torch(model: Any, recipe: Recipe, place: Place, progress: bool) -> None:
    """Makes what is missing of a set, this process's part of it; arguments as for generate."""
    crew = crew_of_this_run()
    if place.device == "cuda" and crew.count > 1:
        local = os.environ.get("LOCAL_RANK", str(crew.rank % max(torch.cuda.device_count(), 1)))
        place = place._replace(device=f"cuda:{local}")
    with source_of(model, recipe, place) as source:
        folder = Folder(place.out, source.settings())
        with folder.written() if crew.first else nullcontext():
            if crew.first:
                folder.remove_damaged()
            else:
                _await(folder, crew)
            with bar_of(folder, progress and crew.first) as bar:
                looked = time.monotonic()
                for number in crew.chunks(folder.digest, folder.missing):
                    folder.put(number, source.chunk(recipe.places(number)))
                    if time.monotonic() - looked > _LOOK:  # at the others' chunks too
                        bar.update(folder.samples() - bar.n)
                        looked = time.monotonic()
                bar.update(folder.samples() - bar.n)
            if crew.first:
                folder.finish()


def _await(folder: Folder, crew: Crew) -> None:
    """Until the first process has begun the set, which must be this one's."""
    while not folder.begun():
        crew.check()
        time.sleep(_PAUSE)
    folder.check()
