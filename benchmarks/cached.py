"""What a cached model saves and what it costs: calls, time and samples of the bundled digits model, by threshold.

Every threshold draws the same samples, from the same noise and labels, in batches of one size; the threshold 0 calls
the model in every row. Times are of whole runs, the thresholds in turns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import fastsample
from benchmarks.common.options import begin, parser
from benchmarks.common.report import write_csv
from fastsample.evaluate import evaluate

THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.4)
STEPS, BATCH, SAMPLES, QUICK_SAMPLES = 50, 100, 1000, 20


@dataclass(frozen=True)
class Row:
    """One threshold.

    Attributes:
        threshold: see fastsample.cached; 0 is the model itself.
        calls: of the model a run, the mean over batches.
        seconds: a run, the median over batches.
        times_faster: than without.
        difference: root mean square, from the samples without, next to these.
        frechet, low, high: the distance to real digits, with its interval.
    """

    threshold: float
    calls: float
    seconds: float
    times_faster: float
    difference: float
    frechet: float
    low: float
    high: float


class Counting:
    """The model, and how often it was called."""

    def __init__(self) -> None:
        self.model, self.calls = fastsample.zoo.digits(), 0
        self.schedule, self.prediction = self.model.schedule, self.model.config.prediction

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        output: Tensor = self.model(x, t, y)
        return output


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the samples, and prints and writes a row for each threshold."""
    run = begin(parser("benchmarks.cached", __doc__).parse_args(argv))
    count = QUICK_SAMPLES if run.quick else SAMPLES
    rows = measured(count)
    for row in rows:
        print(
            f"threshold {row.threshold:<5} {row.calls:5.1f} calls  {row.times_faster:.2f} times as fast  difference "
            f"{row.difference:.3f}  Frechet {row.frechet:.2f} ({row.low:.2f} .. {row.high:.2f})"
        )
    write_csv(run.path("cached", ".csv"), rows)
    return 0


def measured(count: int) -> list[Row]:
    """A row for each threshold, of so many samples."""
    model = Counting()
    seconds: dict[float, list[float]] = {threshold: [] for threshold in THRESHOLDS}
    calls = dict.fromkeys(THRESHOLDS, 0)
    samples: dict[float, list[Tensor]] = {threshold: [] for threshold in THRESHOLDS}
    sampler = fastsample.DDIM(model.schedule, steps=STEPS, prediction=model.prediction, clip=1.0)
    batch = min(BATCH, count)
    for start in range(0, count, batch):
        labels = {"y": torch.arange(start, start + batch) % 10}
        for threshold in THRESHOLDS:
            model.calls, begun = 0, time.perf_counter()
            given = fastsample.cached(model, threshold) if threshold else model
            x = sampler(given, (batch, 1, 28, 28), seed=0, index=start, model_kwargs=labels)
            seconds[threshold].append(time.perf_counter() - begun)
            calls[threshold] += model.calls
            samples[threshold].append(x)
    whole = {threshold: torch.cat(parts) for threshold, parts in samples.items()}
    size = float(whole[0.0].square().mean().sqrt())
    rows = []
    for threshold in THRESHOLDS:
        found = evaluate(whole[threshold].clamp(-1, 1), "mnist5k", labels=torch.arange(count) % 10).samples.frechet
        faster = np.median(np.array(seconds[0.0]) / np.array(seconds[threshold]))
        difference = float((whole[threshold] - whole[0.0]).square().mean().sqrt()) / size
        mean_calls = calls[threshold] / (count / batch)
        rows.append(Row(threshold, mean_calls, float(np.median(seconds[threshold])), float(faster), difference, *found))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
