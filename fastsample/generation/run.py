"""Generates a set of samples: one process, or several that torchrun or Ray has started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from typing_extensions import Unpack

from fastsample.checks import integer, one_of
from fastsample.generation.recipe import Choices, Recipe
from fastsample.generation.with_ray import with_ray
from fastsample.generation.with_torch import with_torch
from fastsample.generation.work import Place, threads
from fastsample.zoo.autoencoder import Autoencoder

Engine = Literal["torch", "ray"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


def generate(
    model: Any,
    out: str | os.PathLike[str],
    *,
    engine: Engine = "torch",
    workers: int | None = None,
    device: str | None = None,
    autoencoder: Autoencoder | None = None,
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
        device: a torch device, to which the model is moved; default its own. Under torchrun "cuda" is a GPU for each
            process.
        autoencoder: of a model of latents, whose images are drawn; the bundled ones bring theirs along.
        progress: show a bar.
        **choices: num, sampler, steps, guidance, classes, null_class, shape, schedule, arguments, seed, batch,
            model_batch, threads and format: see generation.Recipe.

    Returns:
        The folder.

    Raises:
        ValueError, TypeError: arguments that cannot work, a model that cannot be called, or a folder of other settings,
            before anything is written; or samples that are not finite.
        RuntimeError: another run writes into the folder, or a worker failed. OSError: the folder cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from fastsample.generation import merge
        >>> with TemporaryDirectory() as out:
        ...     _ = generate("zoo:trajectory-4", f"{out}/set", num=20, batch=10, progress=False)
        ...     merge(f"{out}/set", f"{out}/digits.npz")
        20
    """
    workers = check_engine(engine, workers)
    recipe, place = recipe_of(model, choices), Place(Path(out), device, autoencoder)
    with threads(recipe.threads):
        if engine == "torch":
            with_torch(model, recipe, place, progress)
        else:
            with_ray(model, recipe, place, progress, workers)
    return Path(out)


def check_engine(engine: str, workers: int | None) -> int | None:
    """The workers of an engine. Raises ValueError or TypeError where it has none, or is unknown."""
    one_of("engine", engine, ENGINES)
    if workers is not None and engine == "torch":
        raise ValueError("workers are Ray's: start several processes with torchrun, or take engine='ray'")
    return None if workers is None else integer("workers", workers, 1)


def recipe_of(model: Any, choices: Mapping[str, Any]) -> Recipe:
    """The recipe of these choices. Raises TypeError for a choice that there is not."""
    if not callable(model) and not isinstance(model, str):
        raise TypeError(f"model must be a text or callable as model(x, t, ...), got {type(model).__name__}")
    name = model if isinstance(model, str) else getattr(model, "__qualname__", type(model).__qualname__)
    if unknown := sorted(choices.keys() - Choices.__annotations__.keys()):
        raise TypeError(
            f"generate takes no {', '.join(unknown)}; of a set it takes {', '.join(Choices.__annotations__)}"
        )
    return Recipe(name, **choices)
