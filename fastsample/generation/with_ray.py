"""The chunks of a set by the workers of a Ray cluster, which all reach the folder."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fastsample.generation.folder import Folder
from fastsample.generation.recipe import Recipe
from fastsample.generation.work import Place, bar_of, source_of, threads

_RETRIES = 3  # of a chunk, where its worker dies


class Worker:
    """One of them, with a model of its own."""

    def __init__(self, recipe: Recipe, place: Place) -> None:
        stack = ExitStack()  # for as long as the worker lives
        stack.enter_context(threads(recipe.threads))
        self._source = stack.enter_context(source_of(recipe.model, recipe, place))
        self._folder = Folder(place.out, self._source.settings())
        self._folder.check()

    def make(self, number: int) -> int:
        """Draws and writes a chunk; returns its number of samples."""
        places = self._folder.recipe.places(number)
        self._folder.put(number, self._source.chunk(places))
        return len(places)

    def ready(self) -> bool:
        """Answers once the worker is there."""
        return True


def with_ray(model: Any, recipe: Recipe, place: Place, progress: bool, workers: int | None) -> None:
    """Makes what is missing of a set; arguments as for generate.

    Raises:
        ImportError: Ray is missing. TypeError: the model is no text. ValueError: the cluster cannot hold the workers.
        RuntimeError: a worker failed.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise ImportError("engine='ray' needs Ray: pip install 'fastsample[ray]'") from error
    if not isinstance(model, str):
        raise TypeError("engine='ray' needs a model by text, which every worker can load")
    place = place._replace(out=place.out.absolute())
    with source_of(model, recipe, place) as source:
        folder = Folder(place.out, source.settings())
    folder.check()
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    kind, amount = ("GPU", 1) if str(place.device).startswith("cuda") else ("CPU", recipe.threads)
    workers = _room(int(ray.cluster_resources().get(kind, 0) // amount), workers, f"{amount} {kind}")
    needed: dict[str, Any] = {f"num_{kind.lower()}s": amount}
    try:
        with folder.written():
            folder.remove_damaged()
            chunks = folder.missing()
            remote = ray.remote(max_restarts=_RETRIES, max_task_retries=_RETRIES, **needed)(Worker)
            actors: list[Any] = [remote.remote(recipe, place) for _ in range(min(workers, len(chunks)))]
            ray.get([actor.ready.remote() for actor in actors])  # a pool would wait for a chunk of one that never comes
            with bar_of(folder, progress) as bar:
                for made in ActorPool(actors).map_unordered(_make, chunks):
                    bar.update(made)
            folder.finish()
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()
        raise RuntimeError(f"a worker of Ray failed: {cause[-1] if cause else type(error).__name__}") from error


def _make(worker: Any, number: int) -> Any:
    return worker.make.remote(number)


def _room(there: int, wanted: int | None, each: str) -> int:
    if there < (wanted or 1):
        raise ValueError(f"workers: the cluster has room for {there} of {each} each, {wanted or 1} are asked for")
    return wanted or there
