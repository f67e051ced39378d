"""The chunks of a set by the workers of a Ray cluster, which all reach the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastsample.generation.folder import Folder
from fastsample.generation.recipe import Recipe
from fastsample.generation.work import bar_of, folder_of, source_of

_RESTARTS = -1  # as often as it takes


class Worker:
    """One of them, with a model of its own."""

    def __init__(self, recipe: Recipe, folder: Path, device: str | None) -> None:
        import torch

        torch.set_num_threads(recipe.threads)
        self._source = source_of(recipe.model, recipe, device)
        self._folder = folder_of(folder, recipe, self._source)

    def make(self, number: int) -> int:
        """Draws and writes a chunk; returns its number of samples."""
        chunk = self._source.chunk(self._folder.recipe.places(number))
        self._folder.put(number, chunk)
        return len(chunk.images)


def with_ray(model: Any, recipe: Recipe, out: Path, device: str | None, progress: bool, workers: int | None) -> None:
    """Makes what is missing of a set; arguments as for generate.

    Raises:
        ImportError: Ray is missing. TypeError: the model is no text.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise ImportError("engine='ray' needs Ray: pip install 'fastsample[ray]'") from error
    if not isinstance(model, str):
        raise TypeError("engine='ray' needs a model by text, which every worker can load")
    folder: Folder = folder_of(out.absolute(), recipe, source_of(model, recipe, device))
    folder.check()
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    needed: dict[str, Any] = {"num_gpus": 1} if str(device).startswith("cuda") else {"num_cpus": recipe.threads}
    [(kind, amount)] = needed.items()
    workers = workers or int(ray.cluster_resources().get("GPU" if kind == "num_gpus" else "CPU", 1) // amount)
    with folder.written():
        chunks = folder.missing()
        remote = ray.remote(max_restarts=_RESTARTS, max_task_retries=_RESTARTS, **needed)(Worker)
        pool = ActorPool([remote.remote(recipe, folder.path, device) for _ in range(min(workers, len(chunks)))])
        with bar_of(recipe, chunks, progress) as bar:
            for made in pool.map_unordered(lambda worker, number: worker.make.remote(number), chunks):
                bar.update(made)
        folder.write_manifest()
