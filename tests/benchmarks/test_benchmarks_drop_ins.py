"""benchmarks.drop_ins and benchmarks.schedulers: smoke runs, and what the second tells apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from benchmarks import drop_ins, schedulers
from benchmarks.cases.drop_ins import Run
from benchmarks.common import cpu
from benchmarks.common.optional import optional
from support.levels import needs_cpu
from support.results import read

RUN = Run("DDIMScheduler", {"clip_sample": False}, {"num_inference_steps": 4})


@needs_cpu
def test_a_quick_run_of_drop_ins(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optional.cache_clear()
    assert drop_ins.main(quick) == 0
    assert "x diffusers" in capsys.readouterr().out
    written = read(tmp_path / f"drop-ins-{cpu.slug(cpu.family())}-quick.csv")
    assert {row["benchmark"].removeprefix("drop-in ") for row in written} == set(drop_ins.CASES)
    assert {row["provider"] for row in written} == {"fastsample", "diffusers"}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of two runs of one class."""
    monkeypatch.setattr(schedulers, "GRIDS", {"DDIMScheduler": [[RUN, Run("DDIMScheduler", {}, RUN.timesteps)]]})


def test_the_grid_ends_well(short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optional.cache_clear()
    results = tmp_path / "grid.csv"
    assert schedulers.main(["--results", str(results)]) == 0
    assert "2 runs, 0 that are more than rounding" in capsys.readouterr().out
    (row,) = read(results)
    assert row["scheduler"] == "DDIMScheduler" and row["steps"] == "8" and row["beyond"] == "0"


def test_the_grid_names_what_is_wrong(
    short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = schedulers.made

    def off(run: Run, drop_in: bool) -> object:
        scheduler = made(run, drop_in)
        if drop_in and run is RUN:
            scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.99
        return scheduler

    monkeypatch.setattr(schedulers, "made", off)
    assert schedulers.main([]) == 1
    said = capsys.readouterr().out
    assert RUN.name in said and "2 runs, 1 that are more than rounding" in said


def test_other_noise_is_infinitely_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Run("DDIMScheduler", {}, RUN.timesteps, {"eta": 1.0})
    assert schedulers.difference(drawn) <= schedulers.MOST

    def twice(self: object, x: Tensor) -> tuple[Tensor, None]:
        from fastsample.integrations.diffusers.base import randn_tensor

        source = self.generator  # type: ignore[attr-defined]
        return (randn_tensor(x.shape, generator=source) + randn_tensor(x.shape, generator=source)) / 2**0.5, None

    monkeypatch.setattr("fastsample.integrations.diffusers.base.Noise.for_state", twice)
    assert schedulers.difference(drawn) == float("inf")
