"""The benchmark of starts: its points, its resumption, and that its distance is the yardstick's."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import starts
from benchmarks.models.relevelled import Relevelled
from fastsample import DDIM, Schedule, spaced_timesteps
from fastsample.evaluate.distances import Real


def rows_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "starts.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_is_taken_up_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--samples", "12", "--kept", str(tmp_path / "kept"), "--out", str(tmp_path)]
    assert starts.main([*flags, "--calls", "2", "--search", ""]) == 0
    first = rows_in(tmp_path)
    assert [(row["spacing"], row["first"]) for row in first] == [("leading", "500"), ("auto", "927")]
    assert float(first[0]["more"]) == 0 > float(first[1]["more_high"]) >= float(first[1]["more"])
    for row in first:
        assert float(row["distance_low"]) < float(row["distance"]) < float(row["distance_high"])
    monkeypatch.setattr(starts.Judge, "sampled", lambda judge, point: pytest.fail("sampled again"))
    assert starts.main([*flags, "--calls", "2", "--search", ""]) == 0
    assert rows_in(tmp_path) == first


def test_points_are_the_spacings_they_name() -> None:
    schedule = Schedule.cosine()
    model = SimpleNamespace(schedule=schedule)
    points = list(starts.points_of("digits", "ddim", schedule, (4,), (4,), ("trailing", "linspace"), "1"))
    assert [point.spacing for point in points[:2]] == ["leading", "auto"]
    tables = {(point.spacing, point.start): point.made(model).table.times for point in points}
    assert tables["trailing", "999"] == tuple(spaced_timesteps(1000, "trailing", 4).tolist())
    assert tables["linspace", "999"] == tuple(spaced_timesteps(1000, "linspace", 4).tolist())
    assert tables["auto", ""] == DDIM(schedule, steps=4).table.times
    searched = {int(start) for _, start in tables if start}
    assert {999, 958, 893} < searched and len(searched) == len(starts.RATIOS)


def test_the_distance_is_that_of_the_yardstick() -> None:
    generator = torch.Generator().manual_seed(0)
    real, samples = (torch.rand(count, 5, generator=generator).double() ** 2 for count in (400, 300))
    weights = [torch.full((len(one),), 1 / len(one)).double() for one in (samples, real)]
    got = starts.frechet_distance(starts.moments(samples, weights[0]), starts.moments(real, weights[1]))
    want = Real(real).frechet_distance(samples, torch.arange(300)[None].repeat(2, 1)).value
    # Covariances are divided by N here, by N - 1 there.
    assert got == pytest.approx(want, rel=1 / 200)


def test_a_model_at_other_levels_is_asked_at_the_same_alpha_bar() -> None:
    own, other = Schedule.cosine(), Schedule.linear()
    asked: list[float] = []

    class Spy:
        schedule = own

        def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            asked.append(float(t[0]))
            return x

    model = Relevelled(Spy(), other)
    given = [10, 500, 999]
    for t in given:
        model(torch.zeros(1), torch.tensor([t]))
    log_snr = np.log(own.alphas_cumprod / (1 - own.alphas_cumprod))
    want = np.log(other.alphas_cumprod[given] / (1 - other.alphas_cumprod[given]))
    # Times are float32, up to 1000, and log SNR falls by up to 2 a timestep there.
    np.testing.assert_allclose(np.interp(asked, np.arange(1000), log_snr), want, rtol=0, atol=1e-3)
