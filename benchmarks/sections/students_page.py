"""What distilled models are worth beside their teacher: a picture, and the table of docs/distillation.md."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import fastsample
from benchmarks.common.markers import replace_between
from benchmarks.sections.quality_cases import GUIDANCE, MIDDLE, Case, StudentCase
from benchmarks.sections.quality_page import draw_lines, interval, table
from benchmarks.sections.quality_rows import Run
from benchmarks.students import MEASURED, RUNS
from fastsample.storage.writing import replace_text

ROOT = Path(__file__).parents[2]
DOCS, QUALITY, README = ROOT / "docs" / "distillation.md", ROOT / "docs" / "quality.md", ROOT / "README.md"
WEIGHTS = ROOT / "docs" / "figures" / "guidance.png"
FIGURES = Path(fastsample.zoo.__file__).with_name("quality.json")
TRAINING = Path(__file__).parents[1] / "results" / "students.csv"
BEGIN, END = "<!-- students, written by benchmarks.quality -->", "<!-- end of students -->"
REAL, LATENT = "real images", "digits-latent"
SHOWN_STUDENTS = {
    *(("trajectory-4", steps) for steps in (4, 2, 1)),
    *((f"progressive-{steps}", steps) for steps in (4, 2, 1)),
    *(("consistency", steps) for steps in (4, 2, 1)),
    *((name, 4) for name in ("guided-4", "guided-4-latent", "lcm", "lcm-lora", "trajectory-4-half")),
}
Rows = Sequence[Mapping[str, str]]
# Of the teacher's rows those that the README shows: sampler, calls, guidance.
SHOWN = {("DDIM", "50", "1.25"), ("DPM-Solver++ 2M", "10", "1.25"), ("DDIM", "50", "1"), ("DPM-Solver++ 2M", "4", "1")}


def show(picture: Path, rows: Rows, students: Sequence[StudentCase], run: Run, write: bool) -> None:
    """Draws the first ten samples of each, prints the table, and writes it into the page where that is asked."""
    draw(picture, students, run)
    text = table_of(rows)
    print(text)
    if write:
        replace_text(FIGURES, json.dumps(figures_of(rows), indent=1) + "\n")
        draw_weights(WEIGHTS, run)
        short = short_table_of(rows)
        for page, part in ((DOCS, text), (QUALITY, short), (README, short)):
            replace_text(page, replace_between(page.read_text(), BEGIN, END, part))


def figures_of(rows: Rows) -> dict[str, float]:
    """Frechet distances as zoo.measured names them."""
    weights = Counter(sampler for sampler, _ in {(row["sampler"], row["guidance"]) for row in rows if _distilled(row)})
    told = [sampler for sampler, count in weights.items() if count > 1]
    return {_name(row, told): float(row["frechet"]) for row in rows}


def _name(row: Mapping[str, str], told: Collection[str]) -> str:
    name = f"{_short(row)}, {row['calls']}"
    folded = _distilled(row) and row["sampler"] not in told
    guided = name if folded or row["guidance"] == "1" else f"{name}, guidance {row['guidance']}"
    return f"{guided}, stochastic" if row["timesteps"].endswith("stochastic") else guided


def table_of(rows: Rows) -> str:
    """A line for each row: its distance, and the same as a share of its teachers' in 50 calls."""
    minutes, lines = _minutes(), []
    for row in rows:
        if row["sampler"] == REAL:
            real = [REAL, "", "", interval(row, "frechet"), "", "", interval(row, "class_agreement"), "", "", ""]
            lines.append(real)
            continue
        unguided, own, guided = (_teacher(rows, row, weight) for weight in (1.0, float(row["guidance"]), GUIDANCE))
        shares = [_ratio(row, other, "frechet", "{:.2f}") for other in (unguided, own)]
        second = f"{1e3 / float(row['ms_per_image']):.0f}"
        faster = "" if guided is None else _ratio(guided, row, "ms_per_image", "{:.1f}")
        name = row["sampler"] if _distilled(row) or row["model"] != LATENT else f"{row['sampler']}, latents"
        name = f"{name}, stochastic" if row["timesteps"].endswith("stochastic") else name
        figures = [interval(row, "frechet"), *shares, interval(row, "class_agreement"), second, faster]
        lines.append([name, row["guidance"], row["calls"], *figures, minutes.get(_short(row), "")])
    header = ["model", "guidance", "calls", "Frechet distance", "of the unguided teacher's", "of its own teacher's"]
    return table([*header, "class agreement", "images a second", "times the guided teacher", "minutes to make"], lines)


def short_table_of(rows: Rows) -> str:
    """The README's: the students beside their teacher at its best, in many steps and in as few, guided and not."""
    lines = []
    for row in rows:
        guided, name = _teacher(rows, row, GUIDANCE), _short(row)
        student = _distilled(row) and (name, int(row["calls"])) in SHOWN_STUDENTS
        student = student and row["guidance"] == f"{GUIDANCE:g}" and row["timesteps"] == "distilled"
        if guided is None or not (student or (_key(row) in SHOWN and row["model"] != LATENT)):
            continue
        how = "no guidance" if row["guidance"] == "1" else "guided"
        ms, faster = float(row["ms_per_image"]), _ratio(guided, row, "ms_per_image", "{:.1f}x")
        named = f"student, {name}" if student else f"teacher, {row['sampler']}, {how}"
        lines.append([named, row["calls"], f"{1e3 / ms:.0f}", faster, interval(row, "frechet")])
    return table(["model", "steps", "images a second", "times as fast", "Frechet distance"], lines)


def _short(row: Mapping[str, str]) -> str:
    name = row["sampler"].removeprefix("digits-")
    return name if _distilled(row) or row["model"] != LATENT else f"{name}, latents"


def _distilled(row: Mapping[str, str]) -> bool:
    return row["timesteps"].startswith("distilled")


def _ratio(row: Mapping[str, str], other: Mapping[str, str] | None, name: str, form: str) -> str:
    return "" if other is None else form.format(float(row[name]) / float(other[name]))


def _teacher(rows: Rows, row: Mapping[str, str], guidance: float) -> Mapping[str, str] | None:
    """The row of the teacher of this one with so much guidance, in 50 calls of DDIM."""
    wanted = (row["model"], "DDIM", "50", f"{guidance:g}")
    return next((other for other in rows if (other["model"], *_key(other)) == wanted), None)


def draw(path: Path, students: Sequence[StudentCase], run: Run) -> None:
    """Ten samples of the teacher and of every student, as a PNG."""
    lines: dict[str, Case | StudentCase] = {
        f"DDIM, {calls}": Case("DDIM", calls, 10, GUIDANCE) for calls in (50, 10, 4)
    }
    for case in students:
        name = f"{case.student.stem.removeprefix('digits-')}, {case.steps}"
        if case.guidance is not None:
            name = f"{name}, guidance {case.guidance:g}"
        if not case.stochastic:
            lines[name] = replace(case, count=10)
    draw_lines(path, lines, run)


def draw_weights(path: Path, run: Run) -> None:
    """Ten samples of the guided teachers and of their students of four steps, by the weight of guidance, as a PNG."""
    lines: dict[str, Case | StudentCase] = {}
    for latent, end in ((False, ""), (True, "-latent")):
        student = fastsample.zoo.STUDENTS[f"guided-4{end}"]
        for weight in (1.0, 2.0, 4.0, 8.0):
            lines[f"teacher{end}, {weight:g}"] = Case("DDIM", MIDDLE[0], 10, weight, latent)
            lines[f"guided-4{end}, {weight:g}"] = StudentCase(student, 4, 10, weight)
    draw_lines(path, lines, run)


def _key(row: Mapping[str, str]) -> tuple[str, str, str]:
    return (row["sampler"], row["calls"], row["guidance"])


def _minutes() -> dict[str, str]:
    """Minutes of one core by the name of the run, which the students of several steps share."""
    if not TRAINING.is_file():
        return {}
    with TRAINING.open(newline="") as file:
        runs = {row["run"]: row["minutes"] for row in csv.DictReader(file)}
    made = {name: run for run, (_, files) in RUNS.items() for name in files}
    made |= {name: run for name, (run, _) in MEASURED.items()}
    return {name: runs[run] for name, run in made.items() if run in runs}
