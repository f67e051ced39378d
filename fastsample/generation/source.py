"""Where the samples of a set come from: a model, its sampler and its classes, for any places of the set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsample.checks import usable_device
from fastsample.generation.chunk import Chunk
from fastsample.generation.formats import check_pictures
from fastsample.generation.recipe import SCHEDULES, Recipe
from fastsample.generation.slices import SlicedModel, Slices
from fastsample.images import to_uint8
from fastsample.model import Predictor, attribute, prediction_of, schedule_of, unwrapped
from fastsample.samplers import (
    DDIM,
    DDPM,
    DEIS,
    IPNDM,
    LCM,
    TCD,
    DPMSolver,
    Euler,
    EulerAncestral,
    Heun,
    Sampler,
    Step,
    UniPC,
)
from fastsample.samplers.solver import Solver
from fastsample.schedule import Schedule
from fastsample.storage.digests import digest_of
from fastsample.tables import COLUMNS, Table
from fastsample.zoo.autoencoder import Autoencoder

SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "deis": DEIS,
    "dpm_solver": DPMSolver,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "heun": Heun,
    "ipndm": IPNDM,
    "lcm": LCM,
    "tcd": TCD,
    "unipc": UniPC,
}
OWN = "distilled"  # the sampler that a student was distilled for
_STEPS = 50


class Source:
    """Draws the samples of a recipe with a model.

    Args:
        recipe: what is to be drawn.
        model: as samplers take it, or a distill.Student.
        autoencoder: of a model of latents.
        device: where to compute; None is where the model is.

    Attributes:
        shape: of one image, (C, H, W).
        name: of the sampler, as in the recipe.
        rows: rows of its table, each a call of the model.
        calls: model calls a sample, of which guidance makes two in a row.

    Raises:
        ValueError, TypeError: what the recipe asks for and the model do not go together.
    """

    def __init__(
        self, recipe: Recipe, model: Any, autoencoder: Autoencoder | None = None, device: str | None = None
    ) -> None:
        self._recipe, self._model = recipe, model
        student = model if _is_student(model) else None
        self._autoencoder = autoencoder or getattr(student, "autoencoder", None)
        self._device = _moved(device, model, self._autoencoder)
        self._known, self._keyword, self._null = classes_of(model)
        self._labels = self._check_classes()
        self._drawn = self._latent_shape(student)
        self.shape = self._drawn if self._autoencoder is None else self._autoencoder.config.shape
        if len(self.shape) != 3:
            raise ValueError(f"shape must be (C, H, W), the shape of an image, got {self.shape}")
        check_pictures(recipe.format, self.shape[0])
        self._steps = self._recipe.steps or (_STEPS if student is None else student.steps()[0])
        self.name, self._sampler = self._sampler_of(student)
        self.rows = len(self._sampler.table)
        self._told = {} if student is None else student.told(1, self.rows, recipe.guidance)
        self._dtype = Predictor(model).known_dtype
        guided = "guidance" in self._asked(range(1)) and recipe.guidance != 1
        self.calls = self.rows * (2 if guided else 1)
        self._try_model()

    def settings(self) -> dict[str, Any]:
        """All that decides the samples, as JSON has it."""
        parts = [part for part in (self._model, self._autoencoder) if isinstance(part, nn.Module)]
        recipe = replace(self._recipe, sampler=self.name, steps=self._steps, shape=self._drawn)
        return {
            "recipe": recipe.as_json(),
            "weights": [digest_of(part) for part in parts],
            "table": _digest(self._sampler.table),
            "device": self._device.type,
            "torch": torch.__version__,
        }

    def chunk(self, places: range, callback: Callable[[Step], object] | None = None) -> Chunk:
        """The samples of these places; callback as in fastsample.Options, for all of them at once."""
        first, count = places.start, len(places)
        slices = Slices(first, count, self._recipe.model_batch)
        sample: Tensor = self._sampler(
            SlicedModel(self._model, slices),
            (count, *self._drawn),
            seed=self._recipe.seed,
            index=first,
            model_dtype=self._dtype,
            device=self._device,
            callback=callback,
            **self._asked(places),
        )
        if self._autoencoder is not None:
            with torch.inference_mode():
                sample = slices(self._autoencoder.decode, sample)
        finite = sample.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(f"sample {first + int(finite.int().argmin())} is not finite: the model returns NaN or inf")
        return Chunk(first, to_uint8(sample).cpu().numpy(), self._labels_at(places))

    def _asked(self, places: range) -> dict[str, Any]:
        """The options of a run that name classes and guidance."""
        count, keywords = len(places), dict(self._told)
        keywords = {name: value.expand(count) for name, value in keywords.items()}
        labels = self._labels_at(places)
        if labels is None:
            return {"model_kwargs": keywords}
        y = {self._keyword: torch.from_numpy(labels).to(self._device)}
        if self._recipe.guidance is None or _is_student(self._model):
            return {"model_kwargs": keywords | y}
        assert self._null is not None
        null = {self._keyword: torch.full_like(y[self._keyword], self._null)}
        return {"guidance": self._recipe.guidance, "cond": y, "uncond": null}

    def _labels_at(self, places: range) -> NDArray[np.int64] | None:
        return None if self._labels is None else self._labels[np.arange(places.start, places.stop) % len(self._labels)]

    def _try_model(self) -> None:
        """Raises ValueError unless the model can be called, before anything is written."""
        x = torch.zeros(1, *self._drawn, dtype=self._dtype or torch.float32, device=self._device)
        t = torch.tensor(self._sampler.table.t[:1], device=self._device)
        asked = self._asked(range(1))
        for keywords in (asked[name] for name in ("model_kwargs", "cond", "uncond") if name in asked):
            try:
                with torch.inference_mode():
                    output = unwrapped(self._model(x, t, **keywords))
            except Exception as error:  # the user's own, and anything
                raise ValueError(f"the model cannot be called: {type(error).__name__}: {error}") from error
            given = tuple(getattr(output, "shape", ()))
            channels = self._drawn[0]
            if given[:1] + given[2:] != (1, *self._drawn[1:]) or given[1] not in (channels, 2 * channels):
                raise ValueError(f"the model must return {(1, *self._drawn)}, or twice the channels, got {given}")

    def _check_classes(self) -> NDArray[np.int64] | None:
        recipe = self._recipe
        if recipe.null_class is not None:
            self._null = recipe.null_class
            if self._known and recipe.null_class > self._known:
                raise ValueError(f"null_class must be from 0 to {self._known}, got {recipe.null_class}")
        if recipe.classes is None and not self._known:
            if recipe.guidance is not None and not _is_student(self._model):
                raise ValueError("guidance needs a model with classes, and this one is not known to have any")
            return None
        labels = np.array(range(self._known) if recipe.classes is None else recipe.classes, dtype=np.int64)
        if self._known and labels.max() >= self._known:
            raise ValueError(f"classes must be from 0 to {self._known - 1}, got {labels.max()}")
        if recipe.guidance is not None and self._null is None and not _is_student(self._model):
            raise ValueError("guidance needs null_class, the class of this model that stands for none")
        return labels

    def _latent_shape(self, student: Any) -> tuple[int, ...]:
        """Of what the model draws."""
        known = shape_of(self._model) if student is None else tuple(student.facts.shape)
        asked = self._recipe.shape
        if self._autoencoder is not None and asked is not None:
            raise ValueError(f"shape is {self._autoencoder.config.shape}, that of the autoencoder: leave it out")
        if asked is None and known is None:
            raise ValueError("shape must be given: the model says none")
        if asked is not None and student is not None and asked != known:
            raise ValueError(f"shape must be {known}, which the student was distilled for, got {asked}")
        return tuple(asked or known or ())

    def _sampler_of(self, student: Any) -> tuple[str, Sampler]:
        name, arguments = self._recipe.sampler, dict(self._recipe.arguments)
        if student is not None and name in (None, OWN):
            if arguments:
                raise ValueError(f"arguments are for a sampler by name; a student's own takes none, got {arguments}")
            return OWN, student.sampler(self._recipe.steps)
        name = name or "ddim"
        if name not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, or {OWN} for a student; got {name!r}")
        kind = SAMPLERS[name]
        known = {one.name for one in fields(kind)} - {"schedule", "steps"}  # type: ignore[arg-type]
        if unknown := sorted(arguments.keys() - known):
            raise ValueError(f"arguments of {name} are {', '.join(sorted(known))}; got {', '.join(unknown)}")
        if "clip" in known and self._autoencoder is None:
            arguments.setdefault("clip", 1.0)  # images end at -1 and 1
        prediction = prediction_of(self._model, arguments.pop("prediction", None))
        flow = issubclass(kind, Solver) and prediction == "flow"
        made: Callable[..., Sampler] = kind
        schedule = None if flow else self._schedule()
        return name, made(schedule, steps=self._steps, prediction=prediction, **arguments)

    def _schedule(self) -> Schedule:
        stated, asked = attribute(self._model, "schedule", Schedule), self._recipe.schedule
        if stated is not None:
            if asked is not None:
                raise ValueError("schedule is the model's own: leave it out")
            return schedule_of(self._model, None)
        if asked is None:
            raise ValueError(f"schedule must be given, one of {', '.join(SCHEDULES)}: the model says none")
        return SCHEDULES[asked]()


def _moved(device: str | None, *parts: Any) -> torch.device:
    """Puts models into eval mode and on a device; returns where they compute."""
    chosen = None if device is None else usable_device(device)
    for module in parts:
        if isinstance(module, nn.Module):
            module.eval()
            if chosen is not None:
                module.to(chosen)
    return chosen or Predictor(parts[0]).device or torch.device("cpu")


def _digest(table: Table) -> str:
    """Of the table's numbers, to the digits that rounding on other machines leaves alone."""
    columns = [[f"{value:.6g}" for value in np.asarray(getattr(table, name))] for name in ("t", *COLUMNS)]
    return sha256(json.dumps(columns).encode()).hexdigest()


def _is_student(model: Any) -> bool:
    return hasattr(model, "facts") and hasattr(model, "sampler")


def _configs(model: Any) -> Iterator[Any]:
    """The configs of a model and of the modules in it, the outermost first."""
    for module in model.modules() if isinstance(model, nn.Module) else (model,):
        config = getattr(module, "config", None)
        if config is not None:
            yield config


def classes_of(model: Any) -> tuple[int, str, int | None]:
    """(how many classes it has, 0 for none; its keyword for them; the one that stands for none)."""
    stated = getattr(model, "num_classes", None)
    if isinstance(stated, int) and stated > 0:
        return stated, "y", None
    for config in _configs(model):
        if getattr(config, "num_class_embeds", None):
            return config.num_class_embeds, "class_labels", None
        if getattr(config, "num_classes", 0):
            return config.num_classes, "y", config.num_classes
    return 0, "y", None


def shape_of(model: Any) -> tuple[int, ...] | None:
    """Of one sample, where the model's config says it."""
    for config in _configs(model):
        if hasattr(config, "channels") and hasattr(config, "size"):
            return (config.channels, *config.size)
        if getattr(config, "sample_size", None) is not None:
            size = config.sample_size
            return (config.in_channels, *(size if isinstance(size, tuple | list) else (size, size)))
    return None
