"""The command `fastsample demo`: a picture of a model in many steps and of its students in few, and what each costs."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsample.commands.console import in_one_line
from fastsample.ops import randn
from fastsample.ops.available import backends
from fastsample.samplers import DDIM, ddim, dpm_solver
from fastsample.schedule import Schedule
from fastsample.storage.writing import check_replaceable, check_writable, replacing
from fastsample.zoo import UNet, digits, measured

HELP = "draw digits by the bundled model and by its students of few steps, and time them"
SHAPE = (10, 1, 28, 28)
GUIDANCE = 1.25  # which the students have folded in, or are told
MANY = 50
SAME = 1.15  # by so much may a Frechet distance differ that is called the same
STUDENTS = (
    ("progressive-4", 4),
    ("guided-4", 4),
    ("lcm", 4),
    ("lcm-lora", 4),
    ("trajectory-4", 2),
    ("trajectory-4", 1),
    ("consistency", 1),
)
# matplotlib's that need no other program.
_FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".tif", ".tiff", ".webp")
NO_LABEL = 10  # the class that stands for any digit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample demo`."""
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="the picture to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="noise seed (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timing rounds, the median counts (%(default)s)")


@in_one_line("demo")
def run(args: argparse.Namespace) -> int:
    """Writes the picture and prints the tables.

    Returns:
        0 on success; 2 where a package is missing or the picture cannot be written, with a word on stderr.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("it draws with matplotlib: pip install 'fastsample[demo]'") from None
    _check_out(args.out)
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    matplotlib.use("Agg")
    model, y = digits(), torch.arange(10)
    rows = rows_of(model, y)
    pictures = [row.draw(args.seed) for row in rows]
    seconds = _seconds(rows, args.rounds)
    _draw(rows, pictures, seconds, args.out)
    print(f"{args.out}: digits 0 to 9 from the same noise, the model in many steps and its students in few\n")
    cpu = backends()["cpu"]
    where = f"cpu kernels ({cpu['isa']})" if cpu["available"] else f"reference backend ({cpu['reason']})"
    print(
        f"{where}, {torch.get_num_threads()} threads, batch of {SHAPE[0]}; medians of {args.rounds} rounds, interleaved"
    )
    _print_rows(rows, seconds)
    _print_loops(model, y, args.rounds)
    _print_seeds(model, args.seed)
    return 0


@dataclass(frozen=True)
class Row:
    """A line of the picture: a model with a sampler, in so many steps.

    Attributes:
        name, steps: what it is called.
        key: its name among the figures of zoo.measured.
        draw: makes the digits 0 to 9 of a seed.
    """

    name: str
    steps: int
    key: str
    draw: Callable[[int], Tensor]


def rows_of(model: UNet, y: Tensor) -> list[Row]:
    """The teacher under guidance, in many steps and in as few as its students."""

    def teacher(name: str, sampler: Callable[..., Any], steps: int) -> Row:
        def draw(seed: int) -> Tensor:
            images: Tensor = sampler(model, SHAPE, steps=steps, seed=seed, clip=1.0, **guided(y))
            return images

        return Row(f"teacher, {name}", steps, f"{name}, {steps}, guidance {GUIDANCE:g}", draw)

    def student(name: str, steps: int) -> Row:
        distilled = digits(name)
        told = {"guidance": GUIDANCE} if "guidance" in distilled.facts.told else {}
        key = f"{name}, {steps}, guidance {GUIDANCE:g}" if told else f"{name}, {steps}"

        def draw(seed: int) -> Tensor:
            images: Tensor = distilled.sample(SHAPE, steps, seed=seed, y=y, **told)
            return images

        of = "student" if distilled.autoencoder is None else "student of latents"
        return Row(f"{of}, {name}", steps, key, draw)

    return [
        teacher("DDIM", ddim, MANY),
        teacher("DPM-Solver++ 2M", dpm_solver, 10),
        teacher("DDIM", ddim, 10),
        teacher("DDIM", ddim, 4),
        *(student(name, steps) for name, steps in STUDENTS),
    ]


def _seconds(rows: list[Row], rounds: int) -> list[float]:
    """Of each row, the median of interleaved rounds."""
    times: list[list[float]] = [[] for _ in rows]
    for _ in range(rounds + 1):
        for row, taken in zip(rows, times, strict=True):
            start = time.perf_counter()
            row.draw(0)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]  # the first round warms up


def _print_rows(rows: list[Row], seconds: list[float]) -> None:
    figures = measured()
    print(_headline(rows, seconds, figures))
    print(f"{'':<28}{'steps':>6}{'images a second':>18}{'times as fast':>16}{'Frechet distance':>19}")
    for row, taken in zip(rows, seconds, strict=True):
        far = figures.get(row.key)
        print(
            f"{row.name:<28}{row.steps:>6}{SHAPE[0] / taken:>18.0f}{seconds[0] / taken:>15.1f}x"
            f"{'' if far is None else format(far, '.2f'):>19}"
        )
    print("(The distances are those of 5,000 samples each, as benchmarks.quality --students found them.)\n")


def _check_out(path: Path) -> None:
    """Raises where the picture could not be written, before samples are drawn for it."""
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"--out must end in one of {', '.join(_FORMATS)}, got {str(path)!r}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--out: no such folder: {folder}")
    check_replaceable(path)
    check_writable(folder)


def guided(y: Tensor) -> dict[str, Any]:
    """The arguments of `ddim` for digits y under classifier-free guidance."""
    return {"guidance": GUIDANCE, "cond": {"y": y}, "uncond": {"y": torch.full_like(y, NO_LABEL)}}


def plain_ddim(model: Denoiser, x: Tensor, steps: int, y: Tensor) -> Tensor:
    """The guided loop as one writes it in plain PyTorch: what `ddim` is timed against."""
    alphas_cumprod = model.schedule.alphas_cumprod
    timesteps = DDIM(model.schedule, steps=steps).table.t.tolist()
    labels = torch.cat([torch.full_like(y, NO_LABEL), y])
    for t, previous in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha_bar = float(alphas_cumprod[t])
        alpha_bar_previous = 1.0 if previous is None else float(alphas_cumprod[previous])
        output = model(torch.cat([x, x]), torch.full((2 * len(x),), t), y=labels)
        unconditional, conditional = output[:, : x.shape[1]].chunk(2)
        epsilon = unconditional + GUIDANCE * (conditional - unconditional)
        x0 = (x - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5
        x = alpha_bar_previous**0.5 * x0 + (1 - alpha_bar_previous) ** 0.5 * epsilon
    return x


class _FreeModel:
    """Returns the same tensor every time, so that only the sampler's own work is timed."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._output = torch.zeros(2 * SHAPE[0], 2 * SHAPE[1], *SHAPE[2:])

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self._output


Denoiser = UNet | _FreeModel


def _headline(rows: list[Row], seconds: list[float], figures: Mapping[str, float]) -> str:
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


def _print_loops(model: UNet, y: Tensor, rounds: int) -> None:
    """Time per step of the whole batch; last with a model that takes no time at all."""
    free = _FreeModel(model.schedule)
    print(f"{'a step of the batch':<28}{'fastsample':>14}{'plain PyTorch':>18}{'plain / fastsample':>22}")
    for name, network in (("digits model", model), ("model free", free)):
        ours, plain, ratio = _interleaved(network, MANY, y, rounds)
        print(f"{name:<28}{_ms(ours, MANY)}{_ms(plain, MANY):>18}{ratio:>21.2f}x")
    print()


def _ms(seconds: float, count: int) -> str:
    return f"{1e3 * seconds / count:11.3f} ms"


@torch.no_grad()
def _interleaved(model: Denoiser, steps: int, y: Tensor, rounds: int) -> tuple[float, float, float]:
    """Median seconds of `ddim` and of `plain_ddim`, and the median of their ratios round by round."""
    x = randn(SHAPE, seed=0)
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        ddim(model, x, steps=steps, **guided(y))
        middle = time.perf_counter()
        plain_ddim(model, x, steps, y)
        times.append((middle - start, time.perf_counter() - middle))
    counted = times[1:]  # the first round warms up
    ratio = statistics.median(b / a for a, b in counted)
    return statistics.median(a for a, _ in counted), statistics.median(b for _, b in counted), ratio


def _print_seeds(model: UNet, seed: int) -> None:
    single, sixteen, place = (1, *SHAPE[1:]), (16, *SHAPE[1:]), 5
    same = torch.equal(randn(single, seed=seed, index=place), randn(sixteen, seed=seed)[place : place + 1])
    eights = torch.full((16,), 8)
    alone = ddim(model, single, steps=20, eta=1.0, seed=seed, index=place, **guided(eights[:1]))
    among = ddim(model, sixteen, steps=20, eta=1.0, seed=seed, **guided(eights))[place : place + 1]
    print(
        f"sample {place} of seed {seed}, alone and in a batch of 16: noise bits {'identical' if same else 'DIFFERENT'};"
        f" samples (eta 1, 20 steps) differ by at most {(alone - among).abs().max():.1e}, which is the model's own "
        "rounding"
    )


def _draw(rows: list[Row], pictures: list[Tensor], seconds: list[float], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), SHAPE[0], figsize=(SHAPE[0] + 2.5, 1.05 * len(rows)))
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
