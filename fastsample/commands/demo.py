"""The command `fastsample demo`: a picture of a model in many steps and of its students in few, and what each costs."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastsample.commands.budget import Budget, repeated
from fastsample.commands.console import in_one_line
from fastsample.commands.demo_loops import Loops, measure, seeds_told
from fastsample.commands.demo_rows import SHAPE, Row, rows_of
from fastsample.commands.machine import BUSY, load, load_text
from fastsample.commands.outputs import check_out
from fastsample.generation.work import threads
from fastsample.ops.available import backends
from fastsample.storage.writing import replacing
from fastsample.zoo import digits, measured

HELP = "draw digits by the bundled model and by its students of few steps, and time them"
BUDGET = 75.0  # seconds, after which nothing is begun anew: with imports and the picture no more than 90
SAME = 1.15  # by so much may a Frechet distance differ that is called the same
# matplotlib's that need no other program.
_FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".tif", ".tiff", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample demo`."""
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="the picture to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="noise seed (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"timing rounds, fewer where they take over {BUDGET:g} s (%(default)s)"
    )


@in_one_line("demo")
def run(args: argparse.Namespace) -> int:
    """Writes the picture and prints the tables. The last line says what to conclude, and how busy the machine was.

    Returns:
        0 on success; 2 where a package is missing or the picture cannot be written, with a word on stderr.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("it draws with matplotlib: pip install 'fastsample[demo]'") from None
    check_out(args.out, _FORMATS)
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    matplotlib.use("Agg")
    share = load()  # before this command makes its own
    busy = share is not None and share >= BUSY
    # Threads that wait for one that has no CPU make times of any length; one thread's own time stays what it is.
    with threads(1 if busy else torch.get_num_threads()):
        _show(args, Budget(BUDGET, time.process_time if busy else time.perf_counter), share)
    return 0


def _show(args: argparse.Namespace, budget: Budget, share: float | None) -> None:
    model, y = digits(), torch.arange(10)
    rows = rows_of(model, y)
    with tqdm(total=len(rows) * (args.rounds + 1), unit=" runs", disable=None, leave=False) as bar:
        pictures, first = _drawn(rows, args.seed, budget, bar)
        rows = rows[: len(pictures)]
        of_digits, of_free = measure(model, y, args.rounds, budget)
        seeds = seeds_told(model, args.seed)
        seconds, rounds = _seconds(rows, first, args.rounds, budget, bar)
    _draw(rows, pictures, seconds, args.out)
    print(f"{args.out}: digits 0 to 9 from the same noise, the model in many steps and its students in few\n")
    print(f"{_where()}, batch of {SHAPE[0]}; {_rounds_told(rounds, args.rounds)}")
    _print_rows(rows, seconds)
    _print_loops(of_digits, of_free)
    print(f"{seeds}\n")
    print(_conclusion(of_digits, of_free, share))


def _drawn(rows: list[Row], seed: int, budget: Budget, bar: tqdm[Any]) -> tuple[list[Tensor], list[float]]:
    """The pictures of the rows, of the first one in any case, and the seconds that they took."""
    pictures: list[Tensor] = []
    seconds: list[float] = []
    for row in rows:
        if pictures and budget.left() < 0:
            break
        start = budget.clock()
        pictures.append(row.draw(seed))
        seconds.append(budget.clock() - start)
        bar.update()
    return pictures, seconds


def _seconds(
    rows: list[Row], first: list[float], rounds: int, budget: Budget, bar: tqdm[Any]
) -> tuple[list[float], int]:
    """Of each row the median of interleaved rounds, and how many there were; of none, the first time it ran."""
    if budget.left() < sum(first):
        return first, 0

    def once() -> list[float]:
        taken = []
        for row in rows:
            start = budget.clock()
            row.draw(0)
            taken.append(budget.clock() - start)
            bar.update()
        return taken

    times = repeated(once, rounds, budget)
    return [statistics.median(taken) for taken in zip(*times, strict=True)], len(times)


def _where() -> str:
    cpu = backends()["cpu"]
    kernels = f"cpu kernels ({cpu['isa']})" if cpu["available"] else f"reference backend ({cpu['reason']})"
    count = torch.get_num_threads()
    return f"{kernels}, {count} thread{'s' * (count > 1)}"


def _rounds_told(rounds: int, asked: int) -> str:
    """How often everything was timed, as text."""
    told = f"medians of {rounds} rounds, interleaved" if rounds else "each timed once, as it ran for the first time"
    return told if rounds == asked else f"{told} ({asked} rounds would take more than {BUDGET:g} s here)"


def _print_rows(rows: Sequence[Row], seconds: Sequence[float]) -> None:
    figures = measured()
    print(_headline(rows, seconds, figures))
    print(f"{'':<28}{'steps':>6}{'images a second':>18}{'times as fast':>16}{'Frechet distance':>19}")
    for row, taken in zip(rows, seconds, strict=True):
        far = figures.get(row.key)
        print(
            f"{row.name:<28}{row.steps:>6}{SHAPE[0] / taken:>18.3g}{seconds[0] / taken:>15.1f}x"
            f"{'' if far is None else format(far, '.2f'):>19}"
        )
    print("(The distances are those of 5,000 samples each, as benchmarks.quality --students found them.)\n")


def _headline(rows: Sequence[Row], seconds: Sequence[float], figures: Mapping[str, float]) -> str:
    """Which student is as good as the teacher in many steps, by distances that were measured, and how much faster."""
    first = figures.get(rows[0].key, 0.0)
    good = [k for k, row in enumerate(rows) if k and figures.get(row.key, math.inf) <= SAME * first]
    if not good:
        return ""
    best = min(good, key=lambda k: seconds[k])
    faster, distance = seconds[0] / seconds[best], figures[rows[best].key]
    return (
        f"As good as {rows[0].name} in {rows[0].steps} steps with guidance and {faster:.0f} times as fast: "
        f"{rows[best].name} in {rows[best].steps}, Frechet distance {distance:.2f} against {first:.2f}."
    )


def _print_loops(of_digits: Loops, of_free: Loops) -> None:
    """Time per step of the whole batch; last with a model that takes no time at all."""
    print(f"{'a step of the batch':<28}{'fastsample':>14}{'plain PyTorch':>18}{'plain / fastsample':>22}")
    for name, (ours, plain, ratio) in (("digits model", of_digits), ("model free", of_free)):
        print(f"{name:<28}{1e3 * ours:11.3f} ms{1e3 * plain:>15.3f} ms{ratio:>21.2f}x")
    print()


def _conclusion(of_digits: Loops, of_free: Loops, crowd: float | None) -> str:
    """What these figures say, and whether they can be trusted.

    Example:
        >>> told = _conclusion(Loops(0.02, 0.02, 1.0), Loops(1e-5, 1.5e-4, 15.0), 1.2)
        >>> told.partition(";")[0]
        'So: 99.95 % of a step is the time of the model, so fewer steps make it faster, whoever runs the loop'
        >>> told.partition("minute before")[2]
        ': others compute too, so this is the own time of one thread.'
    """
    share = min(max(1 - of_free.ours / of_digits.ours, 0.0), 0.9999)
    told = (
        f"So: {100 * share:.2f} % of a step is the time of the model, so fewer steps make it faster, whoever runs the "
        f"loop; models of microseconds gain {of_free.ratio:.0f}x by the loop. The load was {load_text(crowd)}"
    )
    if crowd is None or crowd < BUSY:
        return f"{told}."
    return f"{told}: others compute too, so this is the own time of one thread."


def _draw(rows: list[Row], pictures: list[Tensor], seconds: list[float], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), SHAPE[0], figsize=(SHAPE[0] + 2.5, 1.05 * len(rows)), squeeze=False)
    for line, row, images, taken in zip(axes, rows, pictures, seconds, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image[0].clamp(-1, 1).numpy(), cmap="gray", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        label = f"{row.name}\n{row.steps} step{'s' * (row.steps > 1)}, {SHAPE[0] / taken:.0f} images/s"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout(pad=0.3)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=100)
    pyplot.close(figure)
