"""The seven figures of docs/improved-ddpm.md as PNGs; one that nothing was measured for yet is left out."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fastsample
from benchmarks.common.report import pyplot_for
from benchmarks.sections.improved_bits import bins, numbers
from benchmarks.sections.improved_data import BUNDLED, Data
from benchmarks.sections.improved_samples import SAMPLERS
from benchmarks.sections.improved_training import BOUND, CURVES, PROBABILITY
from benchmarks.sections.quality_cases import LEARNED
from benchmarks.sections.quality_rows import HELD_OUT
from fastsample import Schedule
from fastsample.evaluate import Figure
from fastsample.storage.writing import replacing
from fastsample.train import load_data

SCHEDULES: Mapping[str, Schedule] = {"linear": Schedule.linear(1000), "cosine": Schedule.cosine(1000)}
LENGTHS = (100, 1000, 10000)
LABELS = {"hybrid": "cosine", "linear": "linear", "hybrid-4000": "cosine, T = 4000"}
_DPI, _COLOURS, _LEVELS, _DIGIT = 90, 24, 8, 350


def beta_ratio(T: int) -> NDArray[np.float64]:
    """beta tilde by beta, (1 - abar[t - 1]) / (1 - abar[t]), for t = 1 .. T - 1 of a cosine schedule."""
    alpha_bar = Schedule.cosine(T).alphas_cumprod
    return (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])


def draw(folder: Path, data: Data) -> list[Path]:
    """Draws what there are numbers for, and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [path for number in _DRAWN if (path := _draw(number, folder, data)) is not None]


def file_of(number: int) -> str:
    """The name of a figure's file."""
    return f"improved-ddpm-{number}.png"


def _draw(number: int, folder: Path, data: Data) -> Path | None:
    path = folder / file_of(number)
    pyplot = pyplot_for(path)
    if pyplot is None:
        return None
    try:
        figure = _DRAWN[number](pyplot, data)
    except LookupError:
        pyplot.close("all")
        return None
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    pyplot.close(figure)
    # Few colours: noise takes many bytes otherwise.
    with Image.open(drawn) as image, replacing(path) as file:
        image.convert("RGB").quantize(_COLOURS).save(file, "PNG", optimize=True)
    return path


def _ratios(pyplot: Any, data: Data) -> Any:
    figure, axes = _panel(pyplot)
    for T in LENGTHS:
        axes.plot(np.arange(1, T) / T, beta_ratio(T), label=f"T = {T:,}")
    axes.set(xscale="log", xlabel="t / T", ylabel="beta tilde / beta")
    return _finished(figure, axes)


def _terms(pyplot: Any, data: Data) -> Any:
    figure, axes = _panel(pyplot)
    rows = [row for row in data.whole() if row["model"] in LABELS and row["variance"] == "learned_range"]
    if not rows:
        raise LookupError("no terms")
    for row in rows:
        edges = bins(int(row["steps"]))
        # A bin of one timestep stands at its own place, t = 0 at the left end of a logarithmic axis.
        axes.plot((edges[:-1] + edges[1:] + 1) / 2, numbers(row["terms"]), label=LABELS[row["model"]])
    axes.set(xscale="log", yscale="log", xlabel="t + 1", ylabel="bits per dimension of step t")
    return _finished(figure, axes)


def _forward(pyplot: Any, data: Data) -> Any:
    x0 = load_data(HELD_OUT).scaled(torch.tensor([_DIGIT]))
    times = np.linspace(0, 999, _LEVELS).round().astype(int)
    figure, lines = pyplot.subplots(len(SCHEDULES), _LEVELS, figsize=(7, 2.1), layout="constrained")
    for (name, schedule), panels in zip(SCHEDULES.items(), lines, strict=True):
        for t, axes in zip(times, panels, strict=True):
            x = fastsample.add_noise(x0, int(t), schedule=schedule, seed=0)
            axes.imshow(fastsample.to_uint8(x)[0, ..., 0].numpy(), cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"t = {t}", fontsize=8)
        panels[0].set_ylabel(name, fontsize=8)
    return figure


def _skipping(pyplot: Any, data: Data) -> Any:
    figure, axes = _panel(pyplot)
    for model in ("linear", "hybrid"):
        steps, shares = data.late_starts(model)
        distances = [data.distance(model, LEARNED, steps, skipped=share) for share in shares]
        _bars(axes, [100 * share for share in shares], distances, LABELS[model])
    axes.axvline(20, color="gray", ls=":")
    axes.set(yscale="log", xlabel="% of the reverse process skipped", ylabel="Frechet distance")
    return _finished(figure, axes)


def _levels(pyplot: Any, data: Data) -> Any:
    figure, axes = _panel(pyplot)
    for name, schedule in SCHEDULES.items():
        axes.plot(np.arange(schedule.T) / schedule.T, schedule.alphas_cumprod, label=name)
    axes.set(xlabel="t / T", ylabel="alpha bar")
    return _finished(figure, axes)


def _learning(pyplot: Any, data: Data) -> Any:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for model in CURVES:
        rows = data.course(model, BOUND)
        if not rows:
            raise LookupError(f"no training of {model}")
        left.plot([int(row["x"]) for row in rows], [float(row["value"]) for row in rows], lw=1, label=model)
    left.set(yscale="log", xlabel="step", ylabel="bound of the batch, bits per dimension")
    weights = data.course("vlb-importance", PROBABILITY)
    right.plot([int(row["x"]) + 1 for row in weights], [float(row["value"]) for row in weights])
    right.set(xscale="log", yscale="log", xlabel="t + 1", ylabel="importance sampler's share, uniform = 1")
    right.grid(alpha=0.3)
    return _finished(figure, left)


def _quality(pyplot: Any, data: Data) -> Any:
    models = [name for name in (BUNDLED, "hybrid") if any(data.calls(name, sampler) for sampler in SAMPLERS)]
    if not models:
        raise LookupError("no samples")
    figure, panels = pyplot.subplots(1, len(models), figsize=(4.5 * len(models), 3.6), layout="constrained")
    for axes, model in zip(np.atleast_1d(panels), models, strict=True):
        for sampler in SAMPLERS:
            calls = data.calls(model, sampler)
            _bars(axes, calls, [data.distance(model, sampler, count) for count in calls], sampler)
        axes.set(xscale="log", yscale="log", xlabel="model calls", ylabel="Frechet distance", title=model)
        _finished(figure, axes)
    return figure


def _bars(axes: Any, places: list[Any], figures: list[Figure], label: str) -> None:
    ends = [[abs(figure.value - figure[end]) for figure in figures] for end in (1, 2)]
    axes.errorbar(places, [figure.value for figure in figures], ends, fmt="o-", ms=3, lw=1, label=label)


def _panel(pyplot: Any) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    return figure, axes


def _finished(figure: Any, axes: Any) -> Any:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


_DRAWN: Mapping[int, Callable[[Any, Data], Any]] = {
    1: _ratios,
    2: _terms,
    3: _forward,
    4: _skipping,
    5: _levels,
    6: _learning,
    7: _quality,
}


def schedule_rows() -> Iterator[dict[str, str]]:
    """The numbers of figures 1 and 5, thinned."""
    for T in LENGTHS:
        ratio = beta_ratio(T)
        for t in np.unique(np.geomspace(1, T - 1, 40).round().astype(int)):
            yield _number("beta tilde / beta", "cosine", T, t, ratio[t - 1])
    for name, schedule in SCHEDULES.items():
        for t in (*range(0, schedule.T, 25), schedule.T - 1):
            yield _number("alpha bar", name, schedule.T, t, schedule.alphas_cumprod[t])


def _number(what: str, schedule: str, T: int, t: int, value: float) -> dict[str, str]:
    return {"what": what, "schedule": schedule, "T": str(T), "t": str(t), "value": f"{value:.6g}"}
