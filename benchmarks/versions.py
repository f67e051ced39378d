"""Two checkouts of fastsample side by side: the same benchmark in processes that alternate, each with its own .venv.

    python -m benchmarks.versions --before ../before -- step --shapes 1x16x7 --rounds 30

A row counts as slower where the time after, by the time before, lies from p20 to p80 beyond 1.03.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common.harness import Spread, spread
from benchmarks.common.report import OURS, write_csv

ROOT = Path(__file__).parents[1]
SLOWER, FEWEST = 1.03, 10

Case = tuple[str, str, str]


@dataclass(frozen=True)
class Row:
    """One of our rows in both checkouts.

    Attributes:
        benchmark, case, provider: as the benchmark has them.
        before_us, after_us: medians over processes of the median microseconds a call.
        ratio_p20, ratio_p50, ratio_p80: after by before, formed within each pair of processes.
        runs: processes of each checkout.
        claim: slower, faster or no claim.
    """

    benchmark: str
    case: str
    provider: str
    before_us: float
    after_us: float
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float
    runs: int
    claim: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints, and with --out writes, a row for each of ours; status 1 where one is slower."""
    flags = ArgumentParser(
        "python -m benchmarks.versions", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    flags.add_argument("--before", type=Path, required=True, help="a checkout with its .venv")
    flags.add_argument("--after", type=Path, default=ROOT, help="the other one (this)")
    flags.add_argument("--runs", type=int, default=FEWEST, help="processes of each (%(default)s)")
    flags.add_argument("--out", type=Path, help="file of the results")
    flags.add_argument("command", nargs="+", help="the benchmark's name and arguments, behind --")
    options = flags.parse_args(argv)
    if options.runs < FEWEST:
        flags.error(f"--runs {options.runs} says nothing: at least {FEWEST}")
    before: dict[Case, list[float]] = defaultdict(list)
    after: dict[Case, list[float]] = defaultdict(list)
    for k in range(options.runs):
        turns = [(options.before, before), (options.after, after)]
        for checkout, times in turns if k % 2 == 0 else turns[::-1]:
            for case, time in medians(checkout, options.command).items():
                times[case].append(time)
        print(f"\r{k + 1} of {options.runs} pairs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = [row_of(case, before[case], after[case]) for case in after if case in before]
    for row in rows:
        ratio = f"{row.ratio_p50:.3f} ({row.ratio_p20:.3f} .. {row.ratio_p80:.3f})"
        medians_us = f"{row.before_us:10.2f} {row.after_us:10.2f}"
        print(f"{row.benchmark} {row.case}, {row.provider:<32} {medians_us} us   {ratio} {row.claim}")
    if options.out is not None:
        write_csv(options.out, rows)
    return int(any(row.claim == "slower" for row in rows))


def medians(checkout: Path, command: Sequence[str]) -> dict[Case, float]:
    """Our rows of one process: microseconds a call."""
    name, *arguments = command
    with tempfile.TemporaryDirectory() as folder:
        python = checkout.resolve() / ".venv" / "bin" / "python"
        process = [str(python), "-m", f"benchmarks.{name}", *arguments, f"--out={folder}"]
        subprocess.run(process, cwd=checkout, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [row for path in sorted(Path(folder).glob("*.csv")) for row in csv.DictReader(path.open())]
    ours = [row for row in rows if row["provider"].startswith(OURS) and row.get("claim") != "share"]
    return {(row["benchmark"], row["case"], row["provider"]): float(row["p50_us"]) for row in ours}


def row_of(case: Case, before: Sequence[float], after: Sequence[float]) -> Row:
    """What the pairs of one case say."""
    ratio: Spread = spread(np.array(after) / np.array(before))
    claim = "slower" if ratio.p20 > SLOWER else "faster" if ratio.p80 < 1 / SLOWER else "no claim"
    middle = float(np.median(before)), float(np.median(after))
    return Row(*case, *middle, *ratio, len(after), claim)


if __name__ == "__main__":
    raise SystemExit(main())
