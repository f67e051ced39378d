"""Smoke runs of what shows a cached model and the timesteps of a model's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import cached, few_calls, times
from benchmarks.common import cpu
from support.results import read


def test_cached(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the distances, which take a minute."""
    evaluation = SimpleNamespace(samples=SimpleNamespace(frechet=(2.0, 1.0, 3.0)))
    monkeypatch.setattr(cached, "evaluate", lambda images, reference, labels: evaluation)
    assert cached.main(quick) == 0
    rows = read(tmp_path / f"cached-{cpu.slug(cpu.family())}-quick.csv")
    calls = [float(row["calls"]) for row in rows]
    assert calls == sorted(calls, reverse=True) and calls[0] == 50 and calls[-1] < 45
    assert float(rows[0]["difference"]) == 0 < float(rows[-1]["difference"]) < 1
    assert f"{calls[-1]:.1f} calls" in capsys.readouterr().out


def test_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert times.main(["--quick", "--out", str(tmp_path / "timesteps.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    for line in lines:
        name, listed = line[:28], [float(t) for t in line[28:].split(", ")]
        assert len(listed) == int(name.split(":")[0]) and listed == sorted(listed, reverse=True)
    assert (tmp_path / "timesteps.png").stat().st_size > 1000


def test_few_calls(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    assert few_calls.main([*quick, "--rounds", "1"]) == 0
    rows = read(tmp_path / f"few-calls-{cpu.slug(cpu.family())}-quick.csv")
    assert [row["provider"] for row in rows[:3]] == ["diffusers' DDIM, 8 calls", "DDIM, 8 calls", "UniPC-2, 2 calls"]
    printed = capsys.readouterr().out
    assert "| UniPC-2, 2 calls | 1.25 |" in printed
    assert float(rows[0]["p50_us"]) > 2 * float(rows[2]["p50_us"]), "a quarter of the model calls"


def test_few_calls_have_their_place_in_the_readme() -> None:
    assert few_calls.page([]) and few_calls.BEGIN in few_calls.README.read_text()
