"""What the study of quality shows: curves, a grid of samples, and the tables of docs/quality.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.markers import replace_between
from benchmarks.common.report import pyplot_for
from benchmarks.sections.quality_cases import FEWER_SAMPLES, SAMPLERS, Case, StudentCase
from benchmarks.sections.quality_rows import Run, samples
from fastsample.storage.writing import replace_text, replacing

DOCS = Path(__file__).parents[2] / "docs" / "quality.md"
REAL = "real images"
GRID, QUICK_GRID = (("DDIM", "DPM-Solver++ 2M", "DDPM, learned range"), (4, 10, 50)), (("DDIM",), (4, 10))
Rows = Sequence[Mapping[str, str]]


def draw(path: Path, rows: Rows, run: Run) -> None:
    """Frechet and kernel distance against model calls and against time, as a PNG; unguided rows only.

    Times are compared within one family of CPUs, that of the most rows.
    """
    pyplot = pyplot_for(path)
    if pyplot is None or not rows:
        return
    figure, panels = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
    shown = [row for row in rows if float(row["guidance"]) == 1]
    most = max(int(row["count"]) for row in shown)
    parts = {
        "frechet": [row for row in shown if int(row["count"]) == most or row["sampler"] == REAL],
        "kernel": shown,
    }
    (family, _), *_ = Counter(row["cpu_family"] for row in shown if row["sampler"] != REAL).most_common()
    for (figure_name, part), (calls, times) in zip(parts.items(), panels, strict=True):
        _curves(calls, part, "calls", figure_name)
        timed = [row for row in part if row["cpu_family"] == family or row["sampler"] == REAL]
        _curves(times, timed, "ms_per_image", figure_name)
        times.set_xlabel(f"milliseconds of one core an image, {family}")
    panels[0, 0].legend(fontsize=7)
    figure.suptitle(f"{run.name}: bars from 5 to 95 %; Frechet distance of {most} samples, kernel of all", fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def _curves(axes: Any, rows: Rows, place: str, name: str) -> None:
    for sampler in SAMPLERS:
        line = sorted((row for row in rows if row["sampler"] == sampler), key=lambda row: float(row[place]))
        if line:
            values = [float(row[name]) for row in line]
            bars = [[abs(float(row[f"{name}_{end}"]) - float(row[name])) for row in line] for end in ("low", "high")]
            axes.errorbar([float(row[place]) for row in line], values, bars, fmt="o-", ms=3, lw=1, label=sampler)
    real = [row for row in rows if row["sampler"] == REAL]
    if real:
        best = max(real, key=lambda row: int(row["count"]))
        axes.axhline(float(best[name]), color="black", ls=":", label=f"{best['count']} real images")
    axes.set_xscale("log")
    # A kernel distance may be negative; the worst samples lie orders of magnitude above the best.
    axes.set_yscale("symlog" if name == "kernel" else "log", **({"linthresh": 0.01} if name == "kernel" else {}))
    axes.set_xlabel("model calls")
    axes.set_ylabel(f"{name.capitalize()} distance")
    axes.grid(alpha=0.3)


def draw_grid(path: Path, run: Run, *, quick: bool) -> None:
    """The first ten samples of some samplers at some numbers of calls, as a PNG."""
    names, counts = QUICK_GRID if quick else GRID
    draw_lines(path, {f"{name}, {calls}": Case(name, calls, 10) for name in names for calls in counts}, run)


def draw_lines(path: Path, cases: Mapping[str, Case | StudentCase], run: Run) -> None:
    """Ten samples of every case beside its label, the same noise in every line, as a PNG."""
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, panels = pyplot.subplots(len(cases), 10, figsize=(8, 0.85 * len(cases)), layout="constrained")
    for (label, case), line in zip(cases.items(), panels, strict=True):
        with torch.inference_mode():
            images = samples(case, run).images
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def write(rows: Rows, bits: Rows) -> None:
    """Puts the tables into docs/quality.md."""
    page = DOCS.read_text()
    for name, text in tables(rows, bits).items():
        page = replace_between(page, f"<!-- {name}, written by benchmarks.quality -->", f"<!-- end of {name} -->", text)
    replace_text(DOCS, page)


def tables(rows: Rows, bits: Rows) -> dict[str, str]:
    """The tables of the page by name; a line that says so in place of one that there are no rows for yet."""
    unguided = [row for row in rows if float(row["guidance"]) == 1]
    real = [row for row in unguided if row["sampler"] == REAL]
    many = [row for row in unguided if int(row["count"]) > FEWER_SAMPLES and row["sampler"] != REAL]
    few = [row for row in unguided if int(row["count"]) == FEWER_SAMPLES and row["sampler"] != REAL]
    guided = [row for row in rows if float(row["guidance"]) != 1]
    return {
        "real": _list(real, ("count", "images")),
        "Frechet distances": _crossed(many, "frechet"),
        "class agreement": _crossed(many, "class_agreement"),
        "many calls": _crossed(few, "kernel"),
        "guided": _list(guided, ("sampler", "sampler"), ("calls", "calls"), ("guidance", "guidance")),
        "bits": _bits(bits),
    }


def _crossed(rows: Rows, name: str) -> str:
    """Samplers by model calls."""
    calls = sorted({int(row["calls"]) for row in rows})
    cells = {(row["sampler"], int(row["calls"])): interval(row, name) for row in rows}
    lines = [
        [sampler, *(cells.get((sampler, count), "") for count in calls)]
        for sampler in SAMPLERS
        if any(row["sampler"] == sampler for row in rows)
    ]
    return table(["sampler", *(f"{count} calls" for count in calls)], lines)


def _list(rows: Rows, *columns: tuple[str, str]) -> str:
    """A line for each row, its figures in columns."""
    figures = (
        ("frechet", "Frechet"),
        ("kernel", "kernel"),
        ("precision", "precision"),
        ("recall", "recall"),
        ("class_agreement", "class agreement"),
    )
    header = [title for _, title in (*columns, *figures)]
    return table(
        header, [[*(row[name] for name, _ in columns), *(interval(row, name) for name, _ in figures)] for row in rows]
    )


def _bits(rows: Rows) -> str:
    calls = sorted({int(row["calls"]) for row in rows})
    cells = {
        (row["variance"], int(row["calls"])): f"{float(row['bits']):.3f} ± {float(row['standard_error']):.3f}"
        for row in rows
    }
    names = dict.fromkeys(row["variance"] for row in rows)
    return table(
        ["variance", *(f"{count} calls" for count in calls)],
        [[name, *(cells.get((name, count), "") for count in calls)] for name in names],
    )


def interval(row: Mapping[str, str], name: str) -> str:
    """A figure and its interval; nothing where there is none."""
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return "" if value != value else f"{value:.3g} ({low:.3g} .. {high:.3g})"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    lines = list(lines)
    if not lines:
        return "Not measured yet: `python -m benchmarks.quality --write`."
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))
