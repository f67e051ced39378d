"""The chunks of a set by the workers of a Ray cluster, which all reach the folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

from fastsample.generation.folder import Folder
from fastsample.generation.named import absolute
from fastsample.generation.recipe import Recipe
from fastsample.generation.source import Source
from fastsample.generation.work import Place, bar_of, source_of, threads

_RETRIES = 3  # of a chunk, where its worker dies


class Worker:
    """One of them, with a model of its own, which it loads when it is first asked for something.

    Args:
        model: a text that a worker in any folder understands; the recipe has it as the caller wrote it.
    """

    def __init__(self, model: str, recipe: Recipe, place: Place) -> None:
        self._model, self._recipe, self._place = model, recipe, place

    def settings(self) -> dict[str, Any]:
        """All that decides the samples, as JSON has it."""
        return self._source.settings()

    def make(self, number: int) -> int:
        """Draws and writes a chunk; returns its number of samples."""
        places = self._recipe.places(number)
        self._folder.put(number, self._source.chunk(places))
        return len(places)

    @cached_property
    def _source(self) -> Source:
        stack = ExitStack()  # for as long as the worker lives
        stack.enter_context(threads(self._recipe.threads))
        return stack.enter_context(source_of(self._model, self._recipe, self._place))

    @cached_property
    def _folder(self) -> Folder:
        return Folder(self._place.out, self.settings())


def with_ray(model: Any, recipe: Recipe, place: Place, progress: bool, workers: int | None) -> None:
    """Makes what is missing of a set; arguments as for generate. Models are loaded by the workers alone.

    Raises:
        ImportError: Ray is missing. TypeError: the model is no text. ValueError: the cluster cannot hold the workers,
            or what a worker says of the model. RuntimeError: a worker failed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("engine='ray' needs Ray: pip install 'fastsample[ray]'") from error
    if not isinstance(model, str):
        raise TypeError("engine='ray' needs a model by text, which every worker can load")
    place = place._replace(out=place.out.absolute())
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    kind, amount = ("GPU", 1) if str(place.device).startswith("cuda") else ("CPU", recipe.threads)
    workers = _room(int(ray.cluster_resources().get(kind, 0) // amount), workers, f"{amount} {kind}")
    needed: dict[str, Any] = {f"num_{kind.lower()}s": amount}
    remote = ray.remote(max_restarts=_RETRIES, max_task_retries=_RETRIES, **needed)(Worker)
    try:
        _made_by(partial(remote.remote, absolute(model), recipe, place), place, progress, workers)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError | TypeError | ImportError | OSError):
            raise error.cause from None
        raise RuntimeError(f"a worker of Ray failed: {error.cause}") from error
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()
        raise RuntimeError(f"a worker of Ray failed: {cause[-1] if cause else type(error).__name__}") from error


def _made_by(worker: Callable[[], Any], place: Place, progress: bool, workers: int) -> None:
    """Makes what is missing, by so many workers of this kind."""
    import ray
    from ray.util import ActorPool

    first = worker()
    folder = Folder(place.out, ray.get(first.settings.remote()))
    with folder.written():
        folder.remove_damaged()
        chunks = folder.missing()
        actors = [first, *(worker() for _ in range(min(workers, len(chunks)) - 1))]
        # Before the pool, which would wait for a chunk of one that never comes; and some may have another torch.
        for settings in ray.get([actor.settings.remote() for actor in actors]):
            Folder(place.out, settings).check()
        with bar_of(folder, progress) as bar:
            for made in ActorPool(actors).map_unordered(_make, chunks):
                bar.update(made)
        folder.finish()


def _make(worker: Any, number: int) -> Any:
    return worker.make.remote(number)


def _room(there: int, wanted: int | None, each: str) -> int:
    if there < (wanted or 1):
        raise ValueError(f"workers: the cluster has room for {there} of {each} each, {wanted or 1} are asked for")
    return wanted or there
