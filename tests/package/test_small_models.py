"""docs/small-models.md: its examples run, and its tables say what the results say."""

from __future__ import annotations

import csv
import re
from typing import Any

import pytest

from support.levels import on_threads
from support.paths import ROOT

PAGE = (ROOT / "docs" / "small-models.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"`fastsample.ddim()`": "fastsample.ddim()", "`DDIM` object": "DDIM object", "prepared": "DDIM.prepare"}
Row = dict[str, str]


def results(name: str) -> dict[tuple[str, str, str], Row]:
    with (RESULTS / f"{name}-zen4.csv").open() as file:
        return {(row["benchmark"], row["case"], row["provider"]): row for row in csv.DictReader(file)}


def table(first: str) -> list[list[str]]:
    """The table whose header begins with this cell: the header and the rows."""
    lines = PAGE.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append(line.strip("| ").split(" | "))
    return [rows[0], *rows[2:]]


def milliseconds(row: Row) -> str:
    return f"{float(row['p50_us']) / 1e3:.3g} ms"


def microseconds(value: float) -> str:
    return f"{value:.3g} us" if value < 1000 else f"{value:.0f} us"


@pytest.mark.filterwarnings("error")
def test_examples_run() -> None:
    names: dict[str, Any] = {}
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))
    with on_threads(1):
        exec(compile(code, "small-models.md", "exec"), names)
    assert names["next_actions"].shape == names["shape"] and names["next_actions"].isfinite().all()
    assert 0 < names["p50"] <= names["p99"]


def test_the_warm_start_makes_four_of_ten_calls() -> None:
    names: dict[str, Any] = {}
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))
    exec(compile(code, "small-models.md", "exec"), names)
    calls: list[int] = []
    names["policy"].register_forward_hook(lambda *_: calls.append(1))
    run = names["sampler"].prepare(names["policy"], names["actions"], strength=0.4, model_kwargs=names["seen"])
    run(names["ahead"], seed=3)
    assert len(calls) == 4


def test_whole_runs_are_those_of_the_results() -> None:
    found = results("sampler-short")
    header, *rows = table("steps")
    assert [row[0] for row in rows] == ["10", "50"]
    for steps, *cells in rows:
        of_run = [found["short run", f"1x16x7, {steps} steps", NAMES.get(name, name)] for name in header[1:]]
        assert cells == [microseconds(float(row["p50_us"])) for row in of_run]


def test_late_runs_are_those_of_the_results() -> None:
    found = results("sampler-short")
    _, *rows = table("run")
    assert len(rows) == 5
    for name, p50, p99 in rows:
        row = found["short run, p99 by median", "1x16x7, 10 steps", NAMES.get(name, name)]
        median = float(row["p50_us"])
        assert (p50, p99) == (microseconds(median), microseconds(median * float(row["ratio_p50"])))


def test_chunks_of_actions_are_those_of_the_results() -> None:
    found = results("sampler-actions")
    _, *rows = table("sampler")
    assert len(rows) == 4
    for name, alone, ours, theirs, ratio in rows:
        method, _, steps = name.rpartition(", ")
        of_run = {
            provider: found[f"actions {method}", f"1x16x7, {steps}", provider]
            for provider in ("model alone", "fastsample", "diffusers")
        }
        assert [alone, ours, theirs] == [milliseconds(row) for row in of_run.values()]
        peer = of_run["diffusers"]
        low, middle, high = (f"{float(peer[f'ratio_{quantile}']):.2f}" for quantile in ("p20", "p50", "p80"))
        assert ratio == f"{middle} [{low}, {high}]"


def test_policies_are_those_of_the_results() -> None:
    with (RESULTS / "policy-zen4.csv").open() as file:
        found = {(row["case"], row["provider"]): row for row in csv.DictReader(file)}
    _, *rows = table("policy")
    assert len(rows) == len(found)
    for case, provider, *cells in rows:
        row = found[case, provider]
        seconds = [float(row[name]) / 1e3 for name in ("p50_ms", "p99_ms")]
        times = [f"{one:.3g} s" if one >= 1 else f"{1e3 * one:.3g} ms" for one in seconds]
        outside = [f"{float(row['outside_p50_us']):.0f} us", f"{float(row['share']):.2%}"]
        low, middle, high = (f"{float(row[name]):.2f}" for name in ("ratio_p20", "ratio_p50", "ratio_p80"))
        ratio = "" if middle == low == high == "1.00" else f"{middle} [{low}, {high}]"
        assert cells == [*times, *outside, *([ratio] if ratio else [])]
