"""Samples of the sibling models by sampler, steps and the share of the reverse process that is skipped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

import fastsample
from benchmarks.sections.improved_siblings import Sibling
from benchmarks.sections.quality_cases import LEARNED, Case
from fastsample.evaluate import Figure, digits_classifier
from fastsample.evaluate.distances import Real, mean, resamples
from fastsample.train import ImageData, load_data

SMALL, LARGE = "DDPM, fixed small", "DDPM, fixed large"
SAMPLERS = ("DDIM", LEARNED, SMALL, LARGE)
_BATCH = 100


@dataclass(frozen=True)
class SamplesCase:
    """So many samples; of the sampler's steps the first share `skipped` is left out."""

    model: str
    sampler: str
    steps: int
    skipped: float
    count: int

    @property
    def first(self) -> int:
        """The step that the run begins with."""
        return round(self.skipped * self.steps)

    def image_calls(self) -> int:
        """Images times model calls."""
        return self.count * (self.steps - self.first)


@dataclass(frozen=True)
class SamplesRow:
    """A case and its figures, each with its interval from 5 to 95 %.

    Attributes:
        model, digest, seed: as in BitsRow.
        sampler, steps, skipped, count: as in SamplesCase.
        start: the timestep that the run begins at, which follows from the sampler's default spacing.
        frechet, kernel: distances from the 5,000 digits in the classifier's features.
        class_agreement: the share of samples that are read as the class that was asked for.
    """

    model: str
    digest: str
    sampler: str
    steps: int
    skipped: float
    count: int
    seed: int
    start: float
    frechet: float
    frechet_low: float
    frechet_high: float
    kernel: float
    kernel_low: float
    kernel_high: float
    class_agreement: float
    class_agreement_low: float
    class_agreement_high: float


def measured(case: SamplesCase, sibling: Sibling, seed: int, reference: str, draws: int) -> SamplesRow:
    """Draws the samples and judges them by a part of mnist5k; `draws` are the bootstrap's."""
    data = samples(case, sibling, seed)
    assert data.labels is not None
    seen = _eye().look(data.scaled(torch.arange(case.count)))
    drawn, real = resamples(case.count, draws, seed), _real(reference)
    features = seen.features.double()
    figures: tuple[Figure, ...] = (
        real.frechet_distance(features, drawn),
        real.kernel_distance(features, drawn),
        mean((seen.classes == data.labels).double(), drawn),
    )
    numbers = (value for figure in figures for value in figure)
    visited = (case.sampler, case.steps, case.skipped, case.count, seed, start_of(case, sibling))
    return SamplesRow(sibling.name, sibling.digest, *visited, *numbers)


def samples(case: SamplesCase, sibling: Sibling, seed: int) -> ImageData:
    """Image i has the same initial noise in every case, and class i modulo 10."""
    model, sampler = sibling.load(), sampler_of(case, sibling)
    classes = torch.arange(case.count) % model.config.num_classes
    images = []
    for start in range(0, case.count, _BATCH):
        y = classes[start : start + _BATCH]
        # As in the paper, a run that starts late starts from pure noise all the same.
        x = fastsample.ops.randn((len(y), 1, 28, 28), seed=seed, index=start)
        images.append(sampler(model, x, start_step=case.first, seed=seed, index=start, model_kwargs={"y": y}))
    return ImageData(fastsample.to_uint8(torch.cat(images)).permute(0, 3, 1, 2).contiguous(), classes)


def sampler_of(case: SamplesCase, sibling: Sibling) -> fastsample.Sampler:
    """The whole process that the case runs, or the end of it."""
    return Case(case.sampler, case.steps, case.count).make(sibling.load())


def start_of(case: SamplesCase, sibling: Sibling) -> float:
    """The first timestep that the model is given."""
    return float(sampler_of(case, sibling).table.t[case.first])


@cache
def _eye() -> fastsample.evaluate.DigitsClassifier:
    return digits_classifier()


@cache
def _real(reference: str) -> Real:
    data = load_data(reference)
    return Real(_eye().look(data.scaled(torch.arange(len(data.images)))).features)
