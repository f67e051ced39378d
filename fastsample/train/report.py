"""The course of a training run as a table and as a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastsample.storage.writing import replace_text, replacing

_ROW = 50


def write_report(history: Sequence[tuple[float, float]], out: Path) -> None:
    """Writes loss.csv (means over 50 steps) and, where matplotlib is installed, loss.png.

    Args:
        history: (mse, vb) of every step.
        out: an existing folder.
    """
    ends = range(_ROW, len(history) + _ROW, _ROW)
    rows = [(min(end, len(history)), *np.mean(history[end - _ROW : end], axis=0)) for end in ends]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("step", "loss", "mse", "vb"))
    writer.writerows((step, f"{mse + vb:.6g}", f"{mse:.6g}", f"{vb:.6g}") for step, mse, vb in rows)
    replace_text(out / "loss.csv", text.getvalue())
    _plot(rows, out / "loss.png")


def _plot(rows: Sequence[tuple[float, float, float]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    steps, mse, vb = zip(*rows, strict=True)
    figure = Figure(figsize=(7, 4), layout="constrained")  # without pyplot no display is asked for
    axes = figure.subplots()
    axes.plot(steps, mse, label="mse of epsilon")
    axes.plot(steps, vb, label="variational term")
    axes.set(xlabel="step", ylabel=f"mean over {_ROW} steps", yscale="log")
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
