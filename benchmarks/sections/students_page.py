"""What distilled models are worth beside their teacher: a picture, and the table of docs/distillation.md."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import fastsample
from benchmarks.common.markers import replace_between
from benchmarks.sections.quality_cases import GUIDANCE, Case, StudentCase
from benchmarks.sections.quality_page import draw_lines, interval, table
from benchmarks.sections.quality_rows import Run
from fastsample.storage.writing import replace_text

ROOT = Path(__file__).parents[2]
DOCS, README = ROOT / "docs" / "distillation.md", ROOT / "README.md"
FIGURES = Path(fastsample.zoo.__file__).with_name("quality.json")
TRAINING = Path(__file__).parents[1] / "results" / "students.csv"
BEGIN, END = "<!-- students, written by benchmarks.quality -->", "<!-- end of students -->"
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
        for page, part in ((DOCS, text), (README, short_table_of(rows))):
            replace_text(page, replace_between(page.read_text(), BEGIN, END, part))


def figures_of(rows: Rows) -> dict[str, float]:
    """Frechet distances as zoo.measured names them."""
    figures = {}
    for row in rows:
        guided = row["guidance"] != "1" and row["timesteps"] != "distilled"
        name = f"{row['sampler'].removeprefix('digits-')}, {row['calls']}"
        figures[f"{name}, guidance {row['guidance']}" if guided else name] = float(row["frechet"])
    return figures


def table_of(rows: Rows) -> str:
    """A line for each row: its distance, and the same as a share of the unguided teacher's in 50 calls."""
    teacher = _row(rows, "DDIM", 50, 1.0)
    guided = _row(rows, "DDIM", 50, GUIDANCE)
    minutes = _minutes()
    lines = []
    for row in rows:
        if row["sampler"] == "real images":
            lines.append(
                ["real images", "", interval(row, "frechet"), "", interval(row, "class_agreement"), "", "", ""]
            )
            continue
        share = "" if teacher is None else f"{float(row['frechet']) / float(teacher['frechet']):.2f}"
        faster = "" if guided is None else f"{float(guided['ms_per_image']) / float(row['ms_per_image']):.1f}"
        second = f"{1e3 / float(row['ms_per_image']):.0f}"
        folded = row["timesteps"] == "distilled" or float(row["guidance"]) == 1
        name = row["sampler"] if folded else f"{row['sampler']}, guidance {row['guidance']}"
        figures = [interval(row, "frechet"), share, interval(row, "class_agreement"), second, faster]
        lines.append([name, row["calls"], *figures, minutes.get(row["sampler"].removeprefix("digits-"), "")])
    header = ["model", "calls", "Frechet distance", "of the teacher's", "class agreement", "images a second"]
    return table([*header, "times the guided teacher", "minutes to make"], lines)


def short_table_of(rows: Rows) -> str:
    """The README's: the students beside their teacher at its best, in many steps and in as few, guided and not."""
    guided = _row(rows, "DDIM", 50, GUIDANCE)
    lines = []
    for row in rows:
        distilled = row["timesteps"] == "distilled"
        if guided is None or not (distilled or _key(row) in SHOWN):
            continue
        how = "no guidance" if row["guidance"] == "1" else "guided"
        name = (
            f"student, {row['sampler'].removeprefix('digits-')}" if distilled else f"teacher, {row['sampler']}, {how}"
        )
        ms = float(row["ms_per_image"])
        faster = f"{float(guided['ms_per_image']) / ms:.1f}x"
        lines.append([name, row["calls"], f"{1e3 / ms:.0f}", faster, interval(row, "frechet")])
    return table(["model", "steps", "images a second", "times as fast", "Frechet distance"], lines)


def draw(path: Path, students: Sequence[StudentCase], run: Run) -> None:
    """Ten samples of the teacher and of every student, as a PNG."""
    lines: dict[str, Case | StudentCase] = {
        f"DDIM, {calls}": Case("DDIM", calls, 10, GUIDANCE) for calls in (50, 10, 4)
    }
    for case in students:
        name = case.student.stem.removeprefix("digits-")
        lines[f"{name}, {case.steps}"] = StudentCase(case.student, case.steps, 10)
    draw_lines(path, lines, run)


def _key(row: Mapping[str, str]) -> tuple[str, str, str]:
    return (row["sampler"], row["calls"], row["guidance"])


def _row(rows: Rows, sampler: str, calls: int, guidance: float) -> Mapping[str, str] | None:
    return next((row for row in rows if _key(row) == (sampler, str(calls), f"{guidance:g}")), None)


def _minutes() -> dict[str, str]:
    """Minutes of one core by the name of the run, which the students of several steps share."""
    if not TRAINING.is_file():
        return {}
    with TRAINING.open(newline="") as file:
        runs = {row["run"]: row["minutes"] for row in csv.DictReader(file)}
    halvings = {f"progressive-{steps}": runs["progressive"] for steps in (4, 2, 1) if "progressive" in runs}
    return runs | halvings
