"""The chunks of a set by this process, or by those that torchrun has started."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fastsample.generation.crew import crew_of_this_run
from fastsample.generation.recipe import Recipe
from fastsample.generation.work import bar_of, folder_of, source_of


def with_torch(model: Any, recipe: Recipe, out: Path, device: str | None, progress: bool) -> None:
    """Makes what is missing of a set, this process's part of it; arguments as for generate."""
    crew = crew_of_this_run()
    if device == "cuda" and crew.count > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    source = source_of(model, recipe, device)
    folder = folder_of(out, recipe, source)
    with folder.written() if crew.first else nullcontext():
        chunks = crew.plan(folder.missing() if crew.first else None)
        with bar_of(recipe, chunks, progress and crew.first) as bar:
            there = bar.n
            for number in crew.handed_out(chunks):
                chunk = source.chunk(recipe.places(number))
                folder.put(number, chunk)
                bar.update(there + crew.report(len(chunk.images)) - bar.n)
            crew.leave(lambda done: bar.update(there + done - bar.n))
        if crew.first:
            folder.write_manifest()
