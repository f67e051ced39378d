"""What benchmarks say in words: a sentence for each pair, how long it takes, and whether the machine is quiet."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import harness, progress
from benchmarks.common.harness import Candidate, Timing, measure
from benchmarks.common.options import begin, parser
from benchmarks.common.report import Row, against, rows_of, write_csv
from benchmarks.common.sentences import closing
from fastsample.commands import machine


def timed(case: str, baseline: str, **seconds: list[float]) -> list[Row]:
    timings = {name.replace("_", " "): Timing(np.array(values), 1) for name, values in seconds.items()}
    return rows_of("loop", case, timings, against(baseline, timings))


QUICK = [1e-6] * 3


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        pytest.param(
            timed("a", "fastsample", fastsample=QUICK, diffusers=[41e-6, 83e-6, 127e-6]),
            # The quantiles at 20 and 80 % lie 0.4 of the way from the outer ones to the middle one.
            "fastsample is 83x faster than diffusers [58, 109]",
            id="faster",
        ),
        pytest.param(
            timed("a", "fastsample", fastsample=QUICK, peer=[0.5e-6] * 3),
            "fastsample is 2x slower than peer [2, 2]",
            id="slower",
        ),
        pytest.param(
            timed("a", "fastsample", fastsample=QUICK, peer=[0.5e-6, 1.05e-6, 2e-6]),
            "fastsample and peer: 1.1x as fast [0.72, 1.6], no claim",
            id="no-claim",
        ),
        pytest.param(
            timed("a", "plain loop", prepared=QUICK, plain_loop=[4e-6] * 3),
            "prepared is 4x faster than plain loop [4, 4]",
            id="another-baseline",
        ),
        pytest.param(
            timed("a", "fastsample", fastsample=QUICK, peer=[4e-6] * 3)
            + timed("b", "fastsample", fastsample=QUICK, peer=[20e-6] * 3)
            + timed("c", "fastsample", fastsample=QUICK, peer=[5e-6] * 3),
            "fastsample is 5x faster than peer [4, 20] in 3 cases",
            id="cases",
        ),
        pytest.param(
            timed("a", "fastsample", fastsample=QUICK, peer=[4e-6] * 3)
            + timed("b", "fastsample", fastsample=QUICK, peer=[0.5e-6] * 3),
            "fastsample and peer: 2.2x as fast [0.5, 4] in 2 cases, no claim",
            id="cases-that-differ",
        ),
        pytest.param(timed("a", "fastsample", fastsample=QUICK), "", id="nothing-compared"),
    ],
)
def test_the_sentence_of_a_section(rows: list[Row], sentence: str) -> None:
    assert closing(rows) == sentence


def test_shares_are_no_speeds() -> None:
    [row] = [row for row in timed("a", "fastsample", fastsample=QUICK, part=[2e-6] * 3) if row.baseline]
    assert closing([Row(**{**vars(row), "claim": "share"})]) == ""


def test_a_sentence_for_each_pair() -> None:
    rows = timed("a", "fastsample", fastsample=QUICK, peer=[4e-6] * 3, other=[3e-6] * 3)
    assert len(closing(rows).splitlines()) == 2


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.01, ""), (1.0, "about 7 s: 7 rounds of slow, quick"), (60.0, "about 7 min")]
)
def test_how_long_it_will_take(
    seconds: float, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]

    def slow() -> None:
        clock[0] += seconds

    monkeypatch.setattr(harness, "perf_counter", lambda: clock[0])
    measure([Candidate("slow", slow), Candidate("quick", lambda: clock.__setitem__(0, clock[0] + 1e-4))], 7, 1e-3)
    shown = capsys.readouterr()
    assert shown.err.startswith(told) and bool(shown.err) == bool(told) and not shown.out


def test_how_long_a_section_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By results of any machine; of 40 rounds, where now there are 80."""
    monkeypatch.setattr(progress, "RESULTS", tmp_path)
    rows = [
        replace(row, calls=1000)
        for case in "ab"
        for row in timed(case, "fastsample", fastsample=[1e-3] * 40, peer=[2e-3] * 40)
    ]
    write_csv(tmp_path / "loop-zen9.csv", [*rows, replace(rows[0], claim="share", p50_us=1e12)])
    (tmp_path / "loop-more-zen9.csv").write_text("another,kind\n1,2\n")
    with progress.section("loop", rounds=80):
        measure([Candidate("quick", lambda: None)], 1, 1e-5)
        assert progress._sections[-1].total == 2
    assert not progress._sections
    assert capsys.readouterr().err == "loop: about 8 min for 2 comparisons, as earlier results took\n"
    for name, quick in (("loop", True), ("unknown", False)):
        with progress.section(name, rounds=80, quick=quick):
            pass
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["sampler-loop", "step-noisy", "noise", "lora-projections-float32"])
def test_sections_have_earlier_results(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.section(name, rounds=40):
        pass
    assert capsys.readouterr().err.startswith(f"{name}: about ")


@pytest.mark.parametrize("share", [0.1, 1.4])
def test_a_busy_machine_is_warned_of(
    share: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (share * machine.cpus(), 0.0, 0.0))
    begin(parser("x", None).parse_args(["--quick"]))
    shown = capsys.readouterr().err
    assert ("results to keep need a quiet machine" in shown) == (share > machine.BUSY)
    assert ("140 % of the CPUs" in shown) == (share > machine.BUSY)


@pytest.mark.parametrize(("seconds", "text"), [(9.4, "9 s"), (89.0, "89 s"), (90.0, "2 min"), (3599.0, "60 min")])
def test_durations(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text
