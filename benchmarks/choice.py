"""Whether every process on this machine chooses the same arithmetic for LoRA linears, while all cores are busy.

Starts fresh processes beside loops that keep every core loaded, lets each make the choice for every dtype, and prints
each distinct choice with its count, and how far the measured times lie apart. Exits with status 1 where two processes
differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.options import require_backend
from benchmarks.common.report import write_csv

LOADS, AT_ONCE = 2, 2
ASK = """
import json, time
from fastsample.ops.lora import choice as lora_choice
found = {}
for dtype in lora_choice.DTYPE_CODES:
    start = time.perf_counter()
    made = lora_choice.choice(dtype)
    found[str(dtype).removeprefix("torch.")] = {
        "name": made.name, "first": made.first, "rows": made.rows, "wall": time.perf_counter() - start,
        "seconds": {name: list(times) for name, times in made.seconds.items()}}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Row:
    """One candidate of a dtype over all processes.

    Attributes:
        candidate: a level, or "torch".
        chosen, processes: how many took it, and out of how many.
        measured: how many saw enough rounds to overrule the fixed order.
        ratio_min, ratio_p50, ratio_max: its best time by that of the fixed order's first candidate, over the processes.
        probe_ms: the longest that all rounds took, in CPU time.
        wall_ms_p50, wall_ms_max: of the whole choice, as the process saw it.
    """

    dtype: str
    candidate: str
    chosen: int
    processes: int
    measured: int
    ratio_min: float
    ratio_p50: float
    ratio_max: float
    probe_ms: float
    wall_ms_p50: float
    wall_ms_max: float


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = ArgumentParser(
        "python -m benchmarks.choice", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=50, help="fresh ones (%(default)s)")
    parser.add_argument("--loads", type=int, default=LOADS, help="busy loops a core (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the results")
    options = parser.parse_args(arguments)
    require_backend("cpu")
    if options.processes < 2:
        parser.error("--processes: one alone agrees with itself")
    with busy(options.loads * (os.cpu_count() or 1)):
        answers = ask(options.processes)
    rows = [row for dtype in answers[0] for row in rows_of(dtype, [answer[dtype] for answer in answers])]
    print(f"{options.processes} processes beside {options.loads} busy loops a core")
    for row in rows:
        print(
            f"  {row.dtype:<9} {row.candidate:<12} taken by {row.chosen:>3}, time by the first one's "
            f"{row.ratio_p50:.2f} ({row.ratio_min:.2f} .. {row.ratio_max:.2f}); enough rounds in {row.measured}, probe "
            f"up to {row.probe_ms:.2f} ms, whole choice {row.wall_ms_p50:.0f} ms, up to {row.wall_ms_max:.0f}"
        )
    write_csv(options.out / "choice.csv", rows)
    differing = sorted({row.dtype for row in rows if 0 < row.chosen < row.processes})
    print(f"they differ in {', '.join(differing)}" if differing else "all alike")
    return 1 if differing else 0


def ask(processes: int) -> list[dict[str, Any]]:
    """What each of so many fresh processes chose."""
    # What a caller has forced would be no choice.
    environment = {name: value for name, value in os.environ.items() if name != "FASTSAMPLE_CPU_ISA"}

    def one(_: int) -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, range(processes)))


def rows_of(dtype: str, answers: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for every candidate of this dtype that a process measured or took."""
    # Not in lora_choice: a change of the rule must not change what is asked of it.
    measured = [answer for answer in answers if answer["seconds"] and min(map(len, answer["seconds"].values())) >= 3]
    chosen = Counter(answer["name"] for answer in answers)
    walls = sorted(1e3 * answer["wall"] for answer in answers)
    probe = max((1e3 * sum(map(sum, answer["seconds"].values())) for answer in measured), default=0.0)
    rows = []
    for name in dict.fromkeys([*chosen, *(name for answer in measured for name in answer["seconds"])]):
        times = [answer["seconds"] for answer in measured]
        ratios = sorted(
            min(seconds[name]) / min(seconds[answer["first"]]) for seconds, answer in zip(times, measured, strict=True)
        )
        low, middle, high = (ratios[0], ratios[len(ratios) // 2], ratios[-1]) if ratios else (0.0, 0.0, 0.0)
        wall = walls[len(walls) // 2], walls[-1]
        rows.append(Row(dtype, name, chosen[name], len(answers), len(measured), low, middle, high, probe, *wall))
    return rows


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute as long as this lasts."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: sum(range(10000))"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


if __name__ == "__main__":
    sys.exit(main())
