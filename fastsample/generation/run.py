"""Generates a set of samples: one process, or several that torchrun or Ray has started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from typing_extensions import Unpack

from fastsample.checks import integer, one_of
from fastsample.generation.crew import crew_of_this_run
from fastsample.generation.folder import Folder
from fastsample.generation.named import named_model
from fastsample.generation.recipe import Choices, Recipe
from fastsample.generation.source import Source

ENGINES = ("torch", "ray")


def generate(
    model: Any,
    out: str | os.PathLike[str],
    *,
    engine: str = "torch",
    workers: int | None = None,
    device: str | None = None,
    progress: bool = True,
    **choices: Unpack[Choices],
) -> Path:
    """Draws a set of samples into a folder of chunks. What is there already is kept, so a run that ended goes on.

    Sample i is place i of the set that the seed names, and has class i mod n. It does not depend on the batch, on the
    number of processes or on which of them made it: it is the same to the bit at the same model_batch, threads, kind of
    CPU or GPU and versions. Under `torchrun` every process calls this function and makes chunks as it gets to them.

    Args:
        model: a text such as "zoo:digits" (generation.FORMS), or a model that samplers take, whose `schedule`,
            `prediction` and `config` are looked at as by fastsample.ddim.
        out: the folder, new, empty or of the same settings; docs/scale.md says what it holds.
        engine: "torch", this process or those of torchrun; "ray", workers of a Ray cluster, for a model by text.
        workers: of Ray; default one per CPU, or per GPU where device is "cuda".
        device: a torch device; default that of the model. Under torchrun "cuda" is a GPU for each process.
        progress: show a bar.
        **choices: num, sampler, steps, guidance, classes, null_class, shape, arguments, seed, batch, model_batch,
            threads and format: see generation.Recipe.

    Returns:
        The folder.

    Raises:
        ValueError, TypeError: arguments that cannot work, or a folder of other settings, before anything is written.
        RuntimeError: another run writes into the folder. OSError: it cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from fastsample.generation import merge
        >>> with TemporaryDirectory() as out:
        ...     _ = generate("zoo:trajectory-4", f"{out}/set", num=20, batch=10, progress=False)
        ...     merge(f"{out}/set", f"{out}/digits.npz")
        20
    """
    one_of("engine", engine, ENGINES)
    if workers is not None:
        workers = integer("workers", workers, 1)
        if engine == "torch":
            raise ValueError("workers are Ray's: start several processes with torchrun, or take engine='ray'")
    recipe = recipe_of(model, choices)
    with threads(recipe.threads):
        if engine == "torch":
            _with_torch(model, recipe, Path(out), device, progress)
        else:
            from fastsample.generation.with_ray import with_ray

            with_ray(model, recipe, Path(out), device, progress, workers)
    return Path(out)


def recipe_of(model: Any, choices: Mapping[str, Any]) -> Recipe:
    """The recipe of these choices. Raises TypeError for a choice that there is not."""
    name = model if isinstance(model, str) else type(model).__name__
    if unknown := sorted(choices.keys() - Choices.__annotations__.keys()):
        raise TypeError(
            f"generate takes no {', '.join(unknown)}; of a set it takes {', '.join(Choices.__annotations__)}"
        )
    return Recipe(name, **choices)


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


def _with_torch(model: Any, recipe: Recipe, out: Path, device: str | None, progress: bool) -> None:
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


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets torch have so many CPU threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
