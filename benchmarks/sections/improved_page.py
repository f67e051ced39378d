"""The parts of docs/improved-ddpm.md that are written by benchmarks.improved_ddpm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.markers import replace_between
from benchmarks.sections.improved_bits import bins, numbers
from benchmarks.sections.improved_data import Data, Row
from benchmarks.sections.improved_figures import LENGTHS, SCHEDULES, beta_ratio, file_of
from benchmarks.sections.improved_findings import findings
from benchmarks.sections.improved_samples import SAMPLERS
from benchmarks.sections.quality_cases import LEARNED
from fastsample.evaluate import Figure
from fastsample.storage.writing import replace_text

DOCS = Path(__file__).parents[2] / "docs" / "improved-ddpm.md"
PICTURES = DOCS.with_name("figures")
MISSING = "Not measured yet: the command above fills this in."
TITLES = {
    1: "Beta tilde by beta for three lengths of a cosine schedule",
    2: "Terms of the bound by timestep",
    3: "The forward process of both schedules",
    4: "Frechet distance by the share of the reverse process that is skipped",
    5: "Alpha bar of both schedules",
    6: "Learning curves, and the importance sampler's weights",
    7: "Frechet distance by model calls",
}


def write(data: Data, drawn: Iterable[Path]) -> None:
    """Puts everything into the page."""
    replace_text(DOCS, filled(DOCS.read_text(), data, {path.name for path in drawn}))


def filled(page: str, data: Data, drawn: set[str]) -> str:
    """The page with its parts; a picture is named where it is among the drawn ones."""
    tables = {1: _ratios(), 2: _shares(data), 4: _skipping(data), 5: _levels(), 6: _spreads(data), 7: _calls(data)}
    for number, title in TITLES.items():
        picture = [f"![{title}](figures/{file_of(number)})"] if file_of(number) in drawn else []
        table = [tables[number]] if tables.get(number) else []
        page = _replaced(page, f"figure {number}", "\n\n".join(picture + table) or MISSING)
    page = _replaced(page, "bits", _bits(data) or MISSING)
    return _replaced(page, "findings", _findings(data))


def _replaced(page: str, name: str, text: str) -> str:
    return replace_between(
        page, f"<!-- {name}, written by benchmarks.improved_ddpm -->", f"<!-- end of {name} -->", text
    )


def _ratios() -> str:
    places = (1, 2, 5, 10, 50)
    lines = [[f"{T:,}", *(f"{beta_ratio(T)[t - 1]:.3f}" for t in places)] for T in LENGTHS]
    return _table(["T", *(f"t = {t}" for t in places)], lines)


def _levels() -> str:
    places = (0, 250, 500, 750, 900, 999)
    lines = [[name, *(f"{schedule.alphas_cumprod[t]:.2g}" for t in places)] for name, schedule in SCHEDULES.items()]
    return _table(["schedule", *(f"t = {t}" for t in places)], lines)


def _shares(data: Data) -> str:
    lines = []
    for row in data.whole():
        if row["variance"] != "learned_range":
            continue
        edges, terms = bins(int(row["steps"])), numbers(row["terms"])
        bits = terms * np.diff(edges)
        shares = (bits[edges[1:] <= last].sum() / bits.sum() for last in (1, 10, 100))
        lines.append([row["model"], row["steps"], f"{bits.sum():.3f}", *(f"{100 * share:.0f} %" for share in shares)])
    return _table(["model", "T", "bits of all terms", "t = 0", "about t < 10", "about t < 100"], lines)


def _bits(data: Data) -> str:
    lines = [
        [row["model"], row["variance"], row["steps"], row["count"], _interval(_bound(data, row))] for row in data.bits
    ]
    return _table(["model", "variance", "steps", "digits", "bits per dimension"], lines)


def _bound(data: Data, row: Row) -> Figure:
    return data.bits_of(row["model"], row["variance"], int(row["steps"]))


def _skipping(data: Data) -> str:
    try:
        late = {model: data.late_starts(model) for model in ("linear", "hybrid")}
    except LookupError:
        return ""
    shares = sorted({share for _, shares in late.values() for share in shares})
    lines = [
        [model, *(_cell(data, model, LEARNED, steps, skipped=share) for share in shares)]
        for model, (steps, _) in late.items()
    ]
    return _table(["model", *(f"{100 * share:.0f} %" for share in shares)], lines)


def _spreads(data: Data) -> str:
    def lines() -> Iterator[list[str]]:
        for row in data.training:
            if row["what"] == "spread":
                figure = Figure(*(float(row[name]) for name in ("value", "low", "high")))
                yield [row["model"], row["x"], _interval(figure)]

    return _table(["model", "steps", "spread of the log loss"], list(lines()))


def _calls(data: Data) -> str:
    own = [(row["model"], row["sampler"]) for row in data.samples if float(row["skipped"]) == 0]
    bundled = [("bundled", name) for name in SAMPLERS if data.calls("bundled", name)]
    every = list(dict.fromkeys((*bundled, *own)))
    calls = sorted({count for pair in every for count in data.calls(*pair)})
    lines = [[*pair, *(_cell(data, *pair, count) for count in calls)] for pair in every]
    return _table(["model", "sampler", *(f"{count} calls" for count in calls)], lines)


def _findings(data: Data) -> str:
    lines = [
        [each.statement, each.numbers, _interval(each.difference) if each.difference else "", f"**{each.verdict}**"]
        for each in findings(data)
    ]
    return _table(["the literature says", "our numbers", "difference", "verdict"], lines)


def _cell(data: Data, model: str, sampler: str, calls: int, *, skipped: float = 0.0) -> str:
    try:
        return _interval(data.distance(model, sampler, calls, skipped=skipped))
    except LookupError:
        return ""


def _interval(figure: Figure) -> str:
    return f"{figure.value:.3g} ({figure.low:.3g} .. {figure.high:.3g})"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; nothing without lines."""
    rows = (header, ["---"] * len(header), *lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) if lines else ""
