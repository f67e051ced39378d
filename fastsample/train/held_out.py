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
_GOLDEN = (5**0.5 - 1) / 2


class HeldOut:
    """Measures a loss on images, from the same noise and timesteps every time.

    Args:
        data: the images.
        terms: the loss of every sample, terms(data, index, t, noise).
        T: timesteps.
        batch: noisy images at once.

    Attributes:
        measured: (step, loss) so far.
    """

    files = ("held-out.csv", "held-out.png")

    def __init__(
        self, data: ImageData, terms: Callable[[ImageData, Tensor, Tensor, Tensor], Tensor], T: int, batch: int
    ) -> None:
        self.data, self._terms, self._T, self._batch = data, terms, T, batch
        self.measured: list[tuple[int, float]] = []

    @torch.no_grad()
    def measure(self, step: int) -> None:
        """Notes the loss after so many steps."""
        draws = self.data.count * _DRAWS
        generator = Generator("cpu").manual_seed(0)
        place = torch.arange(draws, dtype=torch.float64, device="cpu")
        # Spread over all timesteps in every image, so that few images tell much.
        t = ((place + 0.5) * _GOLDEN % 1 * self._T).long()
        total = 0.0
        for part in torch.arange(draws, device="cpu").split(self._batch):
            noise = torch.randn(len(part), *self.data.shape, generator=generator, dtype=torch.float32, device="cpu")
            total += float(self._terms(self.data, part // _DRAWS, t[part], noise).double().sum())
        self.measured.append((step, total / draws))

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
