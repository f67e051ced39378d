"""The course of a training run as tables and as a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsample.storage.writing import replace_text, replacing

_ROW = 50
_LABELS = {"mse": "mean square error", "vb": "variational term"}
FILES = ("loss.csv", "loss.png", "timesteps.csv")


def write_report(
    history: Sequence[tuple[float, ...]], names: Sequence[str], out: Path, probabilities: Tensor | None = None
) -> None:
    """Writes loss.csv (means over 50 steps) and, where matplotlib is installed, loss.png.

    With importance sampling also timesteps.csv, the probability of every timestep; the plot has it beside the losses.

    Args:
        history: the losses of every step.
        names: of the losses, such as loss, mse and vb.
        out: an existing folder.
        probabilities: of each timestep, (T,), with importance sampling.
    """
    ends = range(_ROW, len(history) + _ROW, _ROW)
    means = [(min(end, len(history)), *np.mean(history[end - _ROW : end], axis=0)) for end in ends]
    _write(out / "loss.csv", ("step", *names), [(end, *map(_short, values)) for end, *values in means])
    if probabilities is not None:
        rows = [(t, _short(p)) for t, p in enumerate(probabilities.tolist())]
        _write(out / "timesteps.csv", ("t", "probability"), rows)
    _plot(np.array(means), names, None if probabilities is None else probabilities.numpy(), out / "loss.png")


def _short(value: float) -> str:
    return f"{value:.6g}"


def _write(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows(rows)
    replace_text(path, text.getvalue())


def _plot(
    means: NDArray[np.float64], names: Sequence[str], probabilities: NDArray[np.float64] | None, path: Path
) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    panels = 1 if probabilities is None else 2
    figure = Figure(figsize=(7 * panels, 4), layout="constrained")  # without pyplot no display is asked for
    left, *right = figure.subplots(1, panels, squeeze=False)[0]
    steps, *curves = means.T
    for name, curve in zip(names, curves, strict=True):
        left.plot(steps, curve, label=_LABELS.get(name, name))
    left.set(xlabel="step", ylabel=f"mean over {_ROW} steps", yscale="log")
    left.legend()
    if probabilities is not None:
        right[0].plot(probabilities * len(probabilities))
        right[0].set(xlabel="t", ylabel="probability, of the uniform one", yscale="log")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
