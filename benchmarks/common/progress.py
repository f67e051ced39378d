"""What someone who waits for a benchmark sees on stderr: how long it takes, how far it is, how busy the machine is."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from fastsample.commands.machine import BUSY, load, load_text

RESULTS = Path(__file__).parents[1] / "results"
TOLD_FROM = 5.0  # seconds; what takes less is over before it is read
_NO_RUNS = ("share", "p99")  # claims of rows that were worked out of others
_sections: list[tqdm[Any]] = []  # the bar of the section that runs, which every comparison moves on


class Expected(NamedTuple):
    """How long a section will take: comparisons, and the seconds of their rounds. What is set up comes on top."""

    comparisons: int
    seconds: float


@contextmanager
def section(name: str, rounds: int, quick: bool = False) -> Iterator[None]:
    """Tells how long the section with results of this name takes, where there are earlier ones, and shows a bar."""
    expected = None if quick else next(filter(None, map(expected_of, sorted(RESULTS.glob(f"{name}-*.csv")))), None)
    if expected is not None:
        took = expected.seconds * rounds
        told = f"{name}: about {_duration(took)} for {expected.comparisons} comparisons, as earlier results took"
        print(told, file=sys.stderr, flush=True)
    total = None if expected is None else expected.comparisons
    with tqdm(total=total, desc=name, unit=" comparisons", disable=None, leave=False) as bar:
        _sections.append(bar)
        try:
            yield
        finally:
            _sections.pop()


def expected_of(path: Path) -> Expected | None:
    """Of a file of timings, for a single round; None for a file of anything else."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("claim", _NO_RUNS[0]) not in _NO_RUNS]
    seconds = sum(float(row["p50_us"]) * int(row["calls"]) for row in rows) / 1e6
    return Expected(len({(row["benchmark"], row["case"]) for row in rows}), seconds) if rows else None


def shown_rounds(rounds: int, seconds: float, providers: Sequence[str]) -> Iterator[int]:
    """0, 1, ... below `rounds`, of so many seconds each."""
    whole = rounds * seconds
    if whole >= TOLD_FROM:
        print(f"about {_duration(whole)}: {rounds} rounds of {', '.join(providers)}", file=sys.stderr, flush=True)
    yield from tqdm(range(rounds), unit=" rounds", disable=None, leave=False, mininterval=1)
    if _sections:
        _sections[-1].update()


def warn_of_load() -> None:
    """Warns where other programs keep the CPUs busy."""
    share = load()
    if share is not None and share >= BUSY:
        print(
            f"warning: the load is {load_text(share)}: times will come out too long. Ratios are formed within rounds "
            "and suffer less, but results to keep need a quiet machine",
            file=sys.stderr,
            flush=True,
        )


def _duration(seconds: float) -> str:
    """
    Example:
        >>> _duration(9.4), _duration(200)
        ('9 s', '3 min')
    """
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
