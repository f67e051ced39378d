"""The loss on images that are not trained on, in the course of a run: it rises again where a model overfits."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor

from fastsample.storage.writing import replace_text, replacing
from fastsample.train.data import ImageData

_DRAWS = 4  # noisy versions of every image
_BATCH = 50
_GOLDEN = (5**0.5 - 1) / 2


class HeldOut:
    """Measures a loss on images, from the same noise and timesteps every time.

    Args:
        data: the images.
        terms: the loss of every sample, terms(data, index, t, noise).
        T: timesteps.

    Attributes:
        measured: (step, loss) so far.
    """

    files = ("held-out.csv", "held-out.png")

    def __init__(self, data: ImageData, terms: Callable[[ImageData, Tensor, Tensor, Tensor], Tensor], T: int) -> None:
        self.data, self._terms, self._T = data, terms, T
        self.measured: list[tuple[int, float]] = []

    @torch.no_grad()
    def measure(self, step: int) -> None:
        """Notes the loss after so many steps."""
        total, count = 0.0, 0
        for start in range(0, self.data.count, _BATCH):
            images = torch.arange(start, min(start + _BATCH, self.data.count))
            index = images.repeat_interleave(_DRAWS)
            generator = Generator("cpu").manual_seed(start)
            # Spread over all timesteps in every image, so that few images tell much.
            share = (torch.arange(len(index)) * _GOLDEN + torch.rand((), generator=generator)) % 1
            noise = torch.randn(len(index), *self.data.shape, generator=generator)
            total += float(self._terms(self.data, index, (share * self._T).long(), noise).double().sum())
            count += len(index)
        self.measured.append((step, total / count))

    def write(self, out: Path) -> None:
        """Writes held-out.csv and, where matplotlib is installed, held-out.png."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("step", "loss"))
        writer.writerows((step, f"{loss:.6g}") for step, loss in self.measured)
        replace_text(out / self.files[0], text.getvalue())
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*self.measured, strict=True), marker=".")
        axes.set(xlabel="step", ylabel="loss on held-out images")
        with replacing(out / self.files[1]) as file:
            figure.savefig(file, format="png", dpi=120)
