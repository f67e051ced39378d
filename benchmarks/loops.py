"""What a step costs beyond the model: README's table and plot, from the results of `python -m benchmarks.sampler`.

Nothing is measured here: run `python -m benchmarks.sampler --only loop` first, and name the machine by --family.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.markers import replace_between
from benchmarks.common.report import pyplot_for
from fastsample.storage.writing import replace_text, replacing

ROOT = Path(__file__).parents[1]
README, PLOT = ROOT / "README.md", ROOT / "docs" / "figures" / "loops.png"
BEGIN, END = "<!-- loops, written by benchmarks.loops -->", "<!-- end of loops -->"
STEPS = 10
METHODS = {"ddim": "DDIM", "ddpm": "DDPM", "dpm_solver 2M": "DPM-Solver++ 2M", "lcm": "LCM"}
LOOPS = {"diffusers": "diffusers", "plain torch loop": "plain PyTorch", "fastsample": "fastsample"}
Times = dict[str, dict[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; with --write it goes into README.md, and the plot beside."""
    flags = argparse.ArgumentParser("python -m benchmarks.loops", description=__doc__)
    flags.add_argument("--family", default="zen4", help="of the CPU, as results are named (%(default)s)")
    flags.add_argument("--write", action="store_true", help="README.md and docs/figures/loops.png too")
    arguments = flags.parse_args(argv)
    times = times_of(ROOT / "benchmarks" / "results" / f"sampler-loop-{arguments.family}.csv")
    print(page(times))
    if arguments.write:
        replace_text(README, replace_between(README.read_text(), BEGIN, END, page(times)))
        draw(times, PLOT)
    return 0


def times_of(path: Path) -> Times:
    """The median microseconds of a step, by method and loop."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["case"].endswith(f", {STEPS} steps")]
    return {
        name: {
            row["provider"]: float(row["p50_us"])
            for row in rows
            if row["benchmark"] == f"loop {method}" and row["provider"] in LOOPS
        }
        for method, name in METHODS.items()
    }


def page(times: Times) -> str:
    """The table as Markdown."""
    lines = [f"| us a step | {' | '.join(LOOPS.values())} |", "| --- " * (len(LOOPS) + 1) + "|"]
    for name, of_loop in times.items():
        lines.append(f"| {name} | {' | '.join(f'{of_loop[loop]:.3g}' for loop in LOOPS)} |")
    return "\n".join(lines)


def draw(times: Times, path: Path) -> None:
    """The same as bars."""
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(7.5, 2.8), layout="constrained")
    width = 0.8 / len(LOOPS)
    for place, (loop, name) in enumerate(LOOPS.items()):
        heights = [of_loop[loop] for of_loop in times.values()]
        bars = axes.bar([i + (place - 1) * width for i in range(len(times))], heights, width, label=name)
        axes.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=8)
    axes.set_xticks(range(len(times)), times)
    axes.set(yscale="log", ylim=(1, 500), ylabel="microseconds a step")
    axes.set_title("What a step costs beyond the model: 1x16x7, runs of ten steps", fontsize=9)
    axes.legend(fontsize=8, ncols=len(LOOPS), loc="upper right")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
