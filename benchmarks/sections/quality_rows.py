"""A row of the study of quality: one case, sampled and measured in a process of its own on one thread."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor

import fastsample
from benchmarks.sections.quality_cases import (
    FOUND,
    AnyCase,
    BitsCase,
    Case,
    RealCase,
    StudentCase,
    is_latent,
    load_student,
)
from fastsample.evaluate import Distances, Evaluation, Figure, Yardstick
from fastsample.times.automatic import auto_timesteps
from fastsample.train import ImageData, load_data

BATCH = 100
HELD_OUT = "mnist5k-held-out"
LATENT, AUTOENCODER = (
    Path(fastsample.zoo.__file__).with_name(f"digits-{name}.safetensors") for name in ("latent", "autoencoder")
)
NONE = Figure(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class Run:
    """What all rows of a run share."""

    model: Path
    reference: str
    seed: int

    @property
    def name(self) -> str:
        """The model's: of its file, or of the folder where `fastsample train` has put a model.safetensors."""
        return self.model.absolute().parent.name if self.model.stem == "model" else self.model.stem


@dataclass(frozen=True)
class Row:
    """One set of samples and all its figures; NaN stands for one that there is none of.

    Attributes:
        model, digest: its name, and the first letters of its SHA-256.
        sampler: its name in quality_cases.SAMPLERS, or "real images".
        timesteps, first: the spacing's name, and the timestep that the run starts at.
        calls: model calls for each image, guided ones counted once.
        count, guidance, seed: of the samples.
        ms_per_image: milliseconds of one core for each image, the sampler's own work included.
        NAME, NAME_low, NAME_high: a figure of fastsample.evaluate and its interval from 5 to 95 %.
    """

    model: str
    digest: str
    sampler: str
    timesteps: str
    first: float
    calls: int
    count: int
    guidance: float
    seed: int
    ms_per_image: float
    frechet: float
    frechet_low: float
    frechet_high: float
    kernel: float
    kernel_low: float
    kernel_high: float
    precision: float
    precision_low: float
    precision_high: float
    recall: float
    recall_low: float
    recall_high: float
    class_agreement: float
    class_agreement_low: float
    class_agreement_high: float
    nearest: float
    nearest_low: float
    nearest_high: float


@dataclass(frozen=True)
class BitsRow:
    """Bits per dimension of `count` held-out digits: their mean, and its standard error over the digits.

    Attributes:
        model, digest, seed: as in Row.
        variance, calls: of the process.
        bits, standard_error, prior_bits: the bound, and the part of it that is no step's.
        seconds: of one core, in all.
    """

    model: str
    digest: str
    variance: str
    calls: int
    count: int
    seed: int
    bits: float
    standard_error: float
    prior_bits: float
    seconds: float


def key(case: AnyCase, run: Run) -> tuple[str, ...]:
    """What tells this case's row from all others, as texts of the CSV file."""
    path = _path(case, run)
    model, digest = load(path), digest_of(path)
    if isinstance(case, BitsCase):
        return (digest, case.variance, str(min(case.calls, model.schedule.T)), str(case.count), str(run.seed))
    if isinstance(case, StudentCase):
        student, steps = load_student(case.student), str(case.steps)
        first, guidance = str(student.timesteps(case.steps)[0]), f"{_weight(case):g}"
        return (
            digest_of(case.student),
            case.student.stem,
            _distilled(case),
            first,
            steps,
            str(case.count),
            guidance,
            str(run.seed),
        )
    if isinstance(case, RealCase):
        return (digest, "real images", "", "0", "0", str(case.count), "1", str(run.seed))
    spacing, first_time, calls = _visited(case, model)
    visited = (spacing, f"{first_time:g}", str(calls))
    return (digest, case.sampler, *visited, str(case.count), f"{case.guidance:g}", str(run.seed))


def key_of(row: Mapping[str, str]) -> tuple[str, ...]:
    """The same of a row that was read."""
    if "variance" in row:
        names: tuple[str, ...] = ("digest", "variance", "calls", "count", "seed")
    else:
        names = ("digest", "sampler", "timesteps", "first", "calls", "count", "guidance", "seed")
    return tuple(row[name] for name in names)


def measured(case: AnyCase, run: Run) -> Row | BitsRow:
    """The row of a case; in a process that does nothing else, for the time is that of the process."""
    torch.set_num_threads(1)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as in Case.make
        if isinstance(case, BitsCase):
            return _bits_row(case, run)
        if isinstance(case, RealCase):
            distances = yardstick(run.reference).real(case.count)
            return Row(*_names(run), "real images", "", 0, 0, case.count, 1, run.seed, 0, *_figures(distances, None))
        start = process_time()
        data = samples(case, run)
        ms = 1e3 * (process_time() - start) / case.count
        evaluation = yardstick(run.reference).measure(data)
        guidance = _weight(case) if isinstance(case, StudentCase) else case.guidance
        return Row(*_about(case, run), case.count, guidance, run.seed, ms, *_figures(evaluation.samples, evaluation))


def _weight(case: StudentCase) -> float:
    """The guidance of a student: what it is told, or has folded in."""
    guidance = load_student(case.student).facts.guidance
    if case.guidance is not None:
        return case.guidance
    if isinstance(guidance, tuple):
        raise ValueError(f"{case.student} is told its guidance: the case must say it")
    return guidance


def _distilled(case: StudentCase) -> str:
    """What a row has in the place of the name of its timesteps."""
    return "distilled, stochastic" if case.stochastic else "distilled"


def _path(case: AnyCase, run: Run) -> Path:
    """The file of the model that is sampled, or distilled."""
    return LATENT if isinstance(case, Case) and case.latent else run.model


def _about(case: Case | StudentCase, run: Run) -> tuple[str, str, str, str, float, int]:
    """Model, digest, sampler, timesteps, first and calls of a row."""
    if isinstance(case, StudentCase):
        first = float(load_student(case.student).timesteps(case.steps)[0])
        name = LATENT.stem if is_latent(case.student) else run.name
        return (name, digest_of(case.student), case.student.stem, _distilled(case), first, case.steps)
    path = _path(case, run)
    name = run.name if path == run.model else path.stem
    return (name, digest_of(path), case.sampler, *_visited(case, load(path)))


def samples(case: Case | StudentCase, run: Run) -> ImageData:
    """Its samples: image i is at place i of the seed's set, of class i modulo their number, whatever the sampler."""
    config = load(run.model).config
    draw = _drawing(case, run)
    images, classes = [], torch.arange(case.count) % max(config.num_classes, 1)
    for start in range(0, case.count, BATCH):
        images.append(draw(classes[start : start + BATCH], run.seed, start))
    data = fastsample.to_uint8(torch.cat(images)).permute(0, 3, 1, 2).contiguous()
    return ImageData(data, classes if config.num_classes else None)


def _drawing(case: Case | StudentCase, run: Run) -> Callable[[Tensor, int, int], Tensor]:
    """What draws samples of these labels, under a seed from a place on."""
    if isinstance(case, StudentCase):
        student, config = load_student(case.student), load(run.model).config
        shape = (config.channels, *config.size)
        options: dict[str, Any] = {"guidance": case.guidance, "stochastic": case.stochastic}
        return lambda y, seed, index: student.sample(
            (len(y), *shape), case.steps, seed=seed, index=index, y=y, **options
        )
    path = _path(case, run)
    model = load(path)
    decode = load_autoencoder(AUTOENCODER).decode if case.latent else None
    sampler, shape, classes = case.make(model), (model.config.channels, *model.config.size), model.config.num_classes

    def draw(y: Tensor, seed: int, index: int) -> Tensor:
        conditions = _conditions(case, y, classes)
        images: Tensor = sampler(model, (len(y), *shape), seed=seed, index=index, decode=decode, **conditions)
        return images

    return draw


def _conditions(case: Case, labels: Tensor, num_classes: int) -> dict[str, Any]:
    if not num_classes:
        return {}
    if case.guidance == 1:
        return {"model_kwargs": {"y": labels}}
    nothing = {"y": torch.full_like(labels, num_classes)}
    return {"guidance": case.guidance, "cond": {"y": labels}, "uncond": nothing}


def _bits_row(case: BitsCase, run: Run) -> BitsRow:
    model, data, start = load(run.model), load_data(HELD_OUT), process_time()
    bits, prior = [], []
    # They lie class by class: fewer of them are spread over all.
    chosen = torch.arange(case.count) * len(data.images) // case.count
    for index in chosen.split(BATCH):
        y = data.labels[index] if data.labels is not None and model.config.num_classes else None
        total, first = bits_per_dimension(model, data.scaled(index), y, case, run.seed, index.tolist())
        bits.append(total)
        prior.append(first)
    every = torch.cat(bits).double()
    error = float(every.std() / len(every) ** 0.5)
    seconds = process_time() - start
    calls = min(case.calls, model.schedule.T)
    figures = (float(every.mean()), error, float(torch.cat(prior).mean()), seconds)
    return BitsRow(*_names(run), case.variance, calls, case.count, run.seed, *figures)


def bits_per_dimension(
    model: fastsample.zoo.UNet, x0: Tensor, y: Tensor | None, case: BitsCase, seed: int, index: list[int]
) -> tuple[Tensor, Tensor]:
    """(the bound, its prior's part) of each image, (B,) both."""
    bound = fastsample.nll(
        model,
        x0,
        steps=min(case.calls, model.schedule.T),
        variance=case.variance,
        prediction=model.config.prediction,
        seed=seed,
        index=index,
        model_kwargs={} if y is None else {"y": y},
    )
    return bound.total_bpd, bound.prior_bpd


@cache
def load(path: Path) -> fastsample.zoo.UNet:
    """The model of a file, once a process."""
    return fastsample.zoo.load(path)


@cache
def load_autoencoder(path: Path) -> fastsample.zoo.Autoencoder:
    """The autoencoder of a file, once a process."""
    return fastsample.zoo.load_autoencoder(path)


@cache
def digest_of(path: Path) -> str:
    """The first letters of the file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@cache
def yardstick(reference: str) -> Yardstick:
    """Once a process."""
    return Yardstick(reference)


def _names(run: Run) -> tuple[str, str]:
    return run.name, digest_of(run.model)


def _visited(case: Case, model: fastsample.zoo.UNet) -> tuple[str, float, int]:
    """Timesteps, first and calls of a row."""
    if case.sampler.endswith(FOUND):  # which takes a while to find, from where "auto" starts
        return FOUND, float(auto_timesteps(model.schedule, case.calls, model.config.prediction)[0]), case.calls
    sampler = case.make(model)
    spacing = vars(sampler)["timesteps"]
    first = round(float(sampler.table.t[0]), 2)
    return spacing if isinstance(spacing, str) else "given", first, len(sampler.table)


def _figures(distances: Distances, evaluation: Evaluation | None) -> Iterator[float]:
    agreement = evaluation and evaluation.class_agreement
    nearest = evaluation.nearest if evaluation else NONE
    four = (distances.frechet, distances.kernel, distances.precision, distances.recall)
    for figure in (*four, agreement or NONE, nearest):
        yield from figure
