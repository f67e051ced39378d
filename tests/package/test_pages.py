"""README and the other pages as texts: short lines, links that lead somewhere, a reference that names everything."""

from __future__ import annotations

import csv
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fastsample
from support.paths import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_lines_are_short(page: Path) -> None:
    lines = enumerate(page.read_text().splitlines(), start=1)
    assert [number for number, line in lines if len(line) > 160 and not line.startswith("|")] == []


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: named(value) if isinstance(value, Path) else value)
def test_links_lead_somewhere(page: Path, link: str) -> None:
    file, _, heading = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    assert target.is_file()
    headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE) if heading else []
    assert not heading or heading in [anchor(title) for title in headings]


ROOMS = ("benchmarks", "csrc", "docs", "fastsample", "kernels", "tests", "tools")
PATHS = re.compile(rf"(?<![\w/])(?:{'|'.join(ROOMS)})/[\w*/.-]*[\w*/]")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_paths_exist(page: Path) -> None:
    """Those below a folder of the checkout; NAME stands for a name to come, and recipes make files of their own."""
    text = page.read_text()
    made = re.findall(r"^(?:#|//) ([\w/]+\.\w+)$", text, flags=re.MULTILINE)
    paths = {path for path in PATHS.findall(text) if "NAME" not in path and path not in made}
    assert [path for path in sorted(paths) if not any(ROOT.glob(path))] == []


def code_of(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))


def anchor(title: str) -> str:
    """What a heading is called in links to it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_reference_names_all_that_is_public() -> None:
    page = (ROOT / "docs" / "reference" / "README.md").read_text()
    rooms = ("distill", "evaluate", "generation", "lora", "ops", "train", "zoo")
    public = {f"fastsample.{name}" for name in fastsample.__all__ if name not in rooms}
    for room in rooms:
        public |= {f"fastsample.{room}.{name}" for name in import_module(f"fastsample.{room}").__all__}
    described = re.findall(r"`(fastsample\.[\w.]+)`", page)
    assert set(described) == public and len(described) == len(public)


CHOOSING = ROOT / "docs" / "choosing-a-sampler.md"


@pytest.mark.filterwarnings("error")
def test_examples_of_choosing_run() -> None:
    names: dict[str, Any] = {}
    exec(compile(code_of(CHOOSING), CHOOSING.name, "exec"), names)
    assert names["again"].shape == names["shape"] and names["unfinished"].isfinite().all()
    assert (names["bits"] > 0).all() and names["bits"].isfinite().all()


def test_the_printed_table_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "how-it-fits.md"
    exec(compile(code_of(page), page.name, "exec"), {})
    assert f"```\n{capsys.readouterr().out}```" in page.read_text()


def test_errors_are_those_of_the_results() -> None:
    """The table of errors by model calls says what benchmarks.convergence has measured."""
    with (ROOT / "benchmarks" / "results" / "convergence-emerald-rapids.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["study"] == "order"]
    measured = {(int(row["calls"]), row["sampler"]): f"{float(row['error']):.3g}" for row in rows}
    cells = [line.strip("| ").split(" | ") for line in CHOOSING.read_text().splitlines() if line.startswith("|")]
    header = next(line for line in cells if line[0] == "model calls")
    start = cells.index(header) + 2
    assert cells[start][0] == "8" and cells[start + 3][0] == "64"
    for calls, *errors in cells[start : start + 4]:
        assert errors == [measured[int(calls), sampler] for sampler in header[1:]]
