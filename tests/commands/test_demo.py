"""The command line: the demo as a newcomer runs it, and its refusals."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

import fastsample
from fastsample.cli import main
from fastsample.commands import budget, demo, demo_loops, demo_rows
from support.levels import on_threads

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's runs are shorter than a newcomer waits for."""
    monkeypatch.setattr(demo_rows, "MANY", 5)
    monkeypatch.setattr(demo_loops, "FEW", 2)


def test_demo_writes_its_picture_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    picture = tmp_path / "samples.png"
    assert main(["demo", "--out", str(picture), "--rounds", "1"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for part in ("teacher, DDIM", "student, trajectory", "images a second", "model free", "noise bits identical"):
        assert part in shown
    assert "medians of 1 rounds, interleaved\n" in shown
    last = shown.splitlines()[-1]
    share = float(re.search(r"^So: ([\d.]+) % of a step is the time of the model", last)[1])  # type: ignore[index]
    assert 50 < share < 100  # a loop of tens of microseconds beside a network of milliseconds
    assert "The load was " in last


@pytest.mark.parametrize(
    ("busy", "count", "clock"),
    [(None, 2, time.perf_counter), (0.1, 2, time.perf_counter), (2.0, 1, time.process_time)],
    ids=["unknown", "quiet", "busy"],
)
def test_where_others_compute_one_thread_is_timed_by_its_own_time(
    busy: float | None, count: int, clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    monkeypatch.setattr(demo, "load", lambda: busy)
    monkeypatch.setattr(
        demo, "_show", lambda _, limit, share: shown.append((torch.get_num_threads(), limit.clock, share))
    )
    with on_threads(2):
        assert main(["demo", "--out", str(tmp_path / "a.png")]) == 0
        assert torch.get_num_threads() == 2
    assert shown == [(count, clock, busy)]


class Clock:
    """Time that passes only in runs, a second each."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def rows_that_take(clock: Clock, seconds: list[float]) -> list[demo_rows.Row]:
    def row(taken: float) -> demo_rows.Row:
        def draw(seed: int) -> torch.Tensor:
            clock.now += taken
            return torch.zeros(demo_rows.SHAPE)

        return demo_rows.Row("row", 1, "row", draw)

    return [row(taken) for taken in seconds]


@pytest.mark.parametrize(
    ("seconds", "drawn", "rounds"),
    [
        pytest.param([1.0, 0.5], 2, 5, id="quick"),
        pytest.param([10.0, 6.0], 2, 3, id="slow"),
        pytest.param([30.0, 12.0], 2, 0, id="slower"),
        pytest.param([80.0, 80.0, 1.0], 1, 0, id="hopeless"),
    ],
)
def test_the_budget_is_kept(seconds: list[float], drawn: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is begun that would end after it, but for the first picture."""
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    rows, limit, bar = rows_that_take(clock, seconds), budget.Budget(75.0, clock.perf_counter), tqdm(disable=True)
    pictures, first = demo._drawn(rows, 0, limit, bar)
    assert len(pictures) == drawn and first == seconds[:drawn]
    found, repeats = demo._seconds(rows[:drawn], first, 5, limit, bar)
    assert repeats == rounds and found == first
    assert clock.now <= 75 or drawn == 1
    told = demo._rounds_told(repeats, 5)
    assert ("5 rounds would take more than 75 s" in told) == (rounds < 5)


def test_a_busy_machine_is_the_last_word() -> None:
    loops = demo_loops.Loops(0.02, 0.02, 1.0), demo_loops.Loops(1e-5, 1.5e-4, 15.0)
    assert demo._conclusion(*loops, 0.1).endswith("The load was 10 % of the CPUs in the minute before.")
    assert demo._conclusion(*loops, 1.5).endswith("others compute too, so this is the own time of one thread.")
    assert demo._conclusion(*loops, None).endswith("The load was unknown.")
    assert demo._conclusion(loops[1], loops[0], None).startswith("So: 0.00 %")


def test_the_plain_loop_computes_the_same_samples() -> None:
    """The comparison is honest only if both do the same guided work.

    In float64, since the network passes on what each step rounds, by how much depends on a CPU's convolutions.
    """
    model, y = fastsample.zoo.digits().double(), torch.arange(3)
    x = fastsample.ops.randn(demo_rows.SHAPE, seed=1)[:3].double()
    calls: list[tuple[torch.Size, list[int]]] = []
    model.register_forward_hook(
        lambda module, arguments, keywords, output: calls.append((arguments[0].shape, keywords["y"].tolist())),
        with_kwargs=True,
    )
    with torch.no_grad():
        plain = demo_loops.plain_ddim(model, x, 4, y)
    calls_of_plain, calls[:] = calls[:], []
    ours = fastsample.ddim(model, x, steps=4, model_dtype=torch.float64, **demo_rows.guided(y))
    # 2^-53 of a value in each rounding, some millions of times that after four steps through the network.
    assert (plain - ours).abs().max() < 1e-9
    assert calls == calls_of_plain == [(torch.Size((6, 1, 28, 28)), [10] * 3 + [0, 1, 2])] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--out", "missing-folder/samples.png"], "no such folder", id="folder"),
        pytest.param(["--rounds", "0"], "at least 1", id="rounds"),
    ],
)
def test_demo_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_demo_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["demo"]) == 2
    assert "fastsample[demo]" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["--help"], ["train", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert fastsample.__version__ in capsys.readouterr().out
