"""README's table of loops, its plot and its sentence say what the results say."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from benchmarks import loops
from support.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()


def test_the_table_is_that_of_the_results() -> None:
    table = loops.page(loops.times_of(RESULTS / "sampler-loop-zen4.csv"))
    assert f"{loops.BEGIN}\n\n{table}\n\n{loops.END}" in README
    with (RESULTS / "sampler-loop-zen4.csv").open() as file:
        [ddim] = [
            row
            for row in csv.DictReader(file)
            if (row["benchmark"], row["case"], row["provider"]) == ("loop ddim", "1x16x7, 10 steps", "plain torch loop")
        ]
    assert f"| DDIM | 81.5 | {float(ddim['p50_us']):.3g} |" in table


def test_whom_it_is_not_for_is_of_the_results() -> None:
    with (RESULTS / "sampler-digits-zen4.csv").open() as file:
        [row] = [
            row
            for row in csv.DictReader(file)
            if row["benchmark"].startswith("digits ddim") and row["provider"] == "diffusers"
        ]
    low, middle, high = (f"{float(row[f'ratio_{name}']):.2f}" for name in ("p20", "p50", "p80"))
    assert row["case"] == "batch 10, 20 steps"
    assert f"take {middle} [{low}, {high}] times as long in diffusers' loop as here" in README


def test_the_command_writes_the_table_and_the_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(re.sub(f"({loops.BEGIN}).*({loops.END})", r"\1\2", README, flags=re.DOTALL))
    monkeypatch.setattr(loops, "README", page)
    monkeypatch.setattr(loops, "PLOT", tmp_path / "loops.png")
    assert loops.main([]) == 0
    assert not (tmp_path / "loops.png").exists()
    assert loops.main(["--write"]) == 0
    assert page.read_text() == README
    assert (tmp_path / "loops.png").read_bytes().startswith(b"\x89PNG")
    assert "| DDIM |" in capsys.readouterr().out
