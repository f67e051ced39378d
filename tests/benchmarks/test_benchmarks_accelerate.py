"""benchmarks.accelerate: a smoke run, and what it refuses to time."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

import fastsample
from benchmarks import accelerate
from benchmarks.common import cpu
from benchmarks.common.optional import optional
from support.levels import needs_cpu
from support.paths import ROOT
from support.results import read

NAMES = {"no LoRA", "PEFT rank 16", "fastsample rank 16", "fastsample no LoRA"}


@needs_cpu
def test_a_quick_run(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    optional.cache_clear()
    assert accelerate.main(quick) == 0
    shown = capsys.readouterr().out
    assert "of the time without, aim 1.03" in shown
    for dtype in ("float32", "bfloat16"):
        name = f"accelerate-{dtype}-{cpu.slug(cpu.family())}-quick"
        written = read(tmp_path / f"{name}.csv")
        assert {row["provider"] for row in written} == NAMES
        assert {row["baseline"] for row in written} == {"", "no LoRA"}
        assert {row["case"] for row in written} == {"latents 1x4x8x8, 1 steps"}
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@needs_cpu
@pytest.mark.parametrize("absent", ["diffusers", "peft"])
def test_without_its_peers_nothing_is_written(
    absent: str, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    optional.cache_clear()
    assert accelerate.main(quick) == 0 and not list(tmp_path.iterdir())
    optional.cache_clear()


@needs_cpu
@pytest.mark.parametrize("flags", [["--shapes", "4x4"], ["--shapes", "1x3x8x8"], ["--dtypes", "float64"]], ids=str)
def test_flags_that_cannot_work(flags: list[str], quick: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        accelerate.main([*quick, *flags])
    assert not list(tmp_path.iterdir())


def test_an_absent_backend_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fastsample, "backends", lambda: {"cpu": {"available": False, "reason": "nobody compiled it"}})
    with pytest.raises(SystemExit, match="2"):
        accelerate.main(["--quick", "--out", str(tmp_path)])
    assert "nobody compiled it" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_loops_that_differ_are_found() -> None:
    base, effect, roundings = torch.randn(3, 4096)
    latents = {
        "no LoRA": base,
        "fastsample no LoRA": base,
        "PEFT rank 16": base + effect,
        "fastsample rank 16": base + effect + 0.05 * roundings,  # 0.05 sqrt(1/2) of the deviation
    }
    calls = {name: lambda y=y: y for name, y in latents.items()}
    accelerate.check_agreement(calls, rounding=0.03)
    with pytest.raises(AssertionError, match=r"fastsample rank 16 and PEFT rank 16 differ by 0\.03"):
        accelerate.check_agreement(calls, rounding=0.01)
    same = dict.fromkeys(calls, lambda: base)
    with pytest.raises(AssertionError, match="computes what the pipeline without LoRA does"):
        accelerate.check_agreement(same, rounding=0.01)


def test_its_times_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "accelerate.md").read_text()
    for dtype in ("float32", "bfloat16"):
        with (ROOT / "benchmarks" / "results" / f"accelerate-{dtype}-zen4.csv").open() as file:
            rows = {row["provider"]: row for row in csv.DictReader(file)}
        cells = []
        for provider in ("PEFT rank 16", "fastsample rank 16", "fastsample no LoRA"):
            low, middle, high = (f"{float(rows[provider][f'ratio_{name}']):.2f}" for name in ("p20", "p50", "p80"))
            cells.append(f"{middle} [{low}, {high}]")
        assert f"| {dtype} | {' | '.join(cells)} |" in page
