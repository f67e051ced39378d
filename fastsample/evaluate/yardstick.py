"""The yardstick: samples against a reference in every figure, and real images against real ones beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fastsample.checks import integer
from fastsample.evaluate.classifier import CLASSES
from fastsample.evaluate.distances import (
    NEIGHBOURS,
    Figure,
    Real,
    mean,
    median,
    nearest,
    resamples,
)
from fastsample.evaluate.features import Eye, Features, name_of
from fastsample.evaluate.sources import Source, generated_parts, is_generated, load_reference, load_samples
from fastsample.train.data import ImageData

DRAWS, _MOST_DRAWS = 200, 100_000


@dataclass(frozen=True)
class Distances:
    """Two sets in one space of features; every Figure has its interval from 5 to 95 %.

    Attributes:
        count, reference_count: images in either set.
        frechet: Frechet distance; it falls with both counts, so compare equal counts only.
        kernel: unbiased kernel distance, for few samples too; 0 on average for samples like the reference.
        precision, recall: shares of samples that look real, and of real images that samples come close to.
    """

    count: int
    reference_count: int
    frechet: Figure
    kernel: Figure
    precision: Figure
    recall: Figure


@dataclass(frozen=True)
class Evaluation:
    """What samples are worth.

    Attributes:
        features: the name of what was compared.
        samples: against the reference.
        real: as many random images of the reference, but at most half of them, against its others: what real images
            come to.
        class_agreement: the share of samples that the classifier reads as their label; None without labels or without
            the classifier.
        real_class_agreement: the same for held-out real digits.
        nearest: median distance of a sample to the nearest image that was trained on, root mean square over pixels in
            [-1, 1].
        real_nearest: the same for real images that were not trained on; where those are not known, of reference images
            to the nearest other one. Samples that lie much nearer than this are copies.
    """

    features: str
    samples: Distances
    real: Distances
    class_agreement: Figure | None
    real_class_agreement: Figure | None
    nearest: Figure
    real_nearest: Figure


class Yardstick:
    """A reference, seen once, for any number of sets of samples.

    Args:
        reference, features, seed, draws: as in evaluate.

    Raises:
        As evaluate, before any image is looked at.
    """

    def __init__(
        self,
        reference: str | Path = "mnist5k",
        *,
        features: str | Features | None = None,
        seed: int = 0,
        draws: int = DRAWS,
    ) -> None:
        self._seed, self._draws = integer("seed", seed, 0, 2**63 - 1), integer("draws", draws, 2, _MOST_DRAWS)
        self.reference = load_reference(reference)
        self.features = name_of(features, self.reference)
        fewest = 2 * (NEIGHBOURS + 1)
        if len(self.reference.data.images) < fewest:
            count = len(self.reference.data.images)
            raise ValueError(f"reference must hold {fewest} images or more, {self.reference.name} has {count}")
        _require_torchmetrics()
        self._real_by_count: dict[int, Distances] = {}
        self._eye = Eye(features if callable(features) else self.features)

    @cached_property
    def _real(self) -> Real:
        return Real(self._eye.see(self.reference.data)[0])

    def check(self, samples: ImageData) -> None:
        """Raises ValueError where samples cannot be measured: of another shape than the reference, or other classes."""
        wanted, shape = (tuple(data.images.shape[1:]) for data in (self.reference.data, samples))
        if shape != wanted:
            raise ValueError(f"samples must be of the reference's shape {wanted} (C, H, W), got {shape}")
        if self.features == "classifier" and samples.num_classes > CLASSES:
            raise ValueError(f"labels must lie in 0 .. {CLASSES - 1}, the classifier's, got {samples.num_classes - 1}")

    def measure(self, samples: ImageData | Iterable[ImageData]) -> Evaluation:
        """All figures of these samples, whose parts are looked at one by one.

        Raises:
            ValueError: there are too few, or they suit neither the reference nor its classes.
        """
        if isinstance(samples, ImageData):
            _check_count(samples.count)
        features, right, copies = [], [], []
        seen = _pixels(self.reference.seen)
        for part in (samples,) if isinstance(samples, ImageData) else samples:
            self.check(part)
            found, classes = self._eye.see(part)
            features.append(found)
            right.append(None if classes is None or part.labels is None else (classes == part.labels).double())
            copies.append(nearest(_pixels(part), seen))
        known = [part for part in right if part is not None]
        agreement = torch.cat(known) if known and len(known) == len(right) else None
        return self._evaluation(torch.cat(features), agreement, torch.cat(copies))

    def _evaluation(self, features: Tensor, right: Tensor | None, copies: Tensor) -> Evaluation:
        _check_count(len(features))
        return Evaluation(
            self.features,
            self._distances(self._real, features),
            self._real_distances(min(len(features), len(self._real.features) // 2)),
            None if right is None else mean(right, self._resamples(len(right))),
            self._real_agreement,
            median(copies, self._resamples(len(copies))),
            self._real_nearest,
        )

    def real(self, count: int) -> Distances:
        """So many random images of the reference against its others: what the best samples come to.

        Where the reference has classes, both parts have about as many of each, like samples of balanced classes. These
        lie a little nearer to a reference of balanced classes than as many samples of random ones.

        Raises:
            ValueError: where either part is too small.
        """
        features = self._real.features
        count = integer("count", count, NEIGHBOURS + 1, len(features) - NEIGHBOURS - 1)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(self._seed))
        if self.reference.data.labels is not None:
            order = order[_interleaved(self.reference.data.labels[order])]
        return self._distances(Real(features[order[count:]]), features[order[:count]])

    def _real_distances(self, count: int) -> Distances:
        if count not in self._real_by_count:
            self._real_by_count[count] = self.real(count)
        return self._real_by_count[count]

    def _distances(self, reference: Real, samples: Tensor) -> Distances:
        drawn = self._resamples(len(samples))
        return Distances(
            len(samples),
            len(reference.features),
            reference.frechet_distance(samples, drawn),
            reference.kernel_distance(samples, drawn),
            *reference.coverage(samples, self._seed, self._draws),
        )

    @cached_property
    def _real_agreement(self) -> Figure | None:
        unseen = self.reference.unseen
        if unseen is None or unseen.labels is None:
            return None
        _, classes = self._eye.see(unseen)
        return None if classes is None else mean((classes == unseen.labels).double(), self._resamples(len(classes)))

    @cached_property
    def _real_nearest(self) -> Figure:
        unseen, seen = self.reference.unseen, _pixels(self.reference.seen)
        apart = nearest(seen, seen, same=True) if unseen is None else nearest(_pixels(unseen), seen)
        return median(apart, self._resamples(len(apart)))

    def _resamples(self, count: int) -> Tensor:
        return resamples(count, self._draws, self._seed)


def _check_count(count: int) -> None:
    if count <= NEIGHBOURS:
        raise ValueError(f"samples must be more than {NEIGHBOURS}, got {count}")


def _interleaved(labels: Tensor) -> Tensor:
    """An order in which the first n images, for any n, have about as many of each class as the whole: int64 (N,)."""
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        (members,) = (labels == label).nonzero(as_tuple=True)
        place[members] = (torch.arange(len(members)) + 0.5).double() / len(members)
    return place.argsort(stable=True)


def evaluate(
    samples: Source,
    reference: str | Path = "mnist5k",
    *,
    labels: Tensor | None = None,
    features: str | Features | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> Evaluation:
    """Measures samples against real images; docs/quality.md says what the figures are worth.

    Args:
        samples: an .npz file or a folder as for fastsample.train.load_data, where the images may also be floating
            point in [-1, 1]; a folder of fastsample.generate, of which one chunk at a time is in memory; or a tensor
            (N, C, H, W), uint8 or floating point.
        reference: "mnist5k", "mnist5k-train", "mnist5k-held-out", an .npz file or a folder.
        labels: int64 (N,), the class that was asked for of each sample, in place of those that the source has.
        features: "classifier", 64 hidden units of the bundled classifier of digits, the default for mnist5k; "pixels",
            64 averages of every channel; "inception", the 2048 of torchmetrics' Inception, which needs torch-fidelity
            and fetches its weights; or a function from float32 (N, C, H, W) in [-1, 1] to (N, D).
        seed: of the bootstrap and of which real images are taken. The same seed gives the same figures.
        draws: of the bootstrap, at least 2.

    Raises:
        ImportError: torchmetrics or mlxtend is needed and missing.
        ValueError, TypeError, FileNotFoundError: the samples or the reference cannot be read, differ in shape or are
            too few, or the features do not suit them.
    """
    images = generated_parts(samples, labels) if is_generated(samples) else load_samples(samples, labels)
    yardstick = Yardstick(reference, features=features, seed=seed, draws=draws)
    return yardstick.measure(images)


def _require_torchmetrics() -> None:
    try:
        import torchmetrics.image.fid  # noqa: F401
    except ImportError as error:
        raise ImportError("distances are taken with torchmetrics: pip install 'fastsample[evaluate]'") from error


def _pixels(data: ImageData) -> Tensor:
    flat = data.scaled(torch.arange(len(data.images))).flatten(1)
    return flat / flat.shape[1] ** 0.5
