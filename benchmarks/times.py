"""Where timesteps fall: "auto", Align Your Steps, and those of fastsample.optimal_timesteps on the bundled models.

Draws docs/figures/timesteps.png, a line of ticks for each, over sigma / alpha, and prints them.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import fastsample
from benchmarks.common.report import pyplot_for
from fastsample import DDIM
from fastsample.storage.writing import replacing
from fastsample.times.levels import sigma_over_alpha

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "timesteps.png"
COUNTS, SAMPLES = (4, 6, 10), 60
Times = tuple[int | float, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Finds, prints and draws them."""
    options = ArgumentParser("python -m benchmarks.times", description=__doc__)
    options.add_argument("--out", type=Path, default=FIGURE, help="the picture (%(default)s)")
    options.add_argument("--quick", action="store_true", help="few samples: a smoke run")
    arguments = options.parse_args(argv)
    torch.set_num_threads(1)
    rows = {name: times for name, times in lists(6 if arguments.quick else SAMPLES)}
    for name, times in rows.items():
        print(f"{name:<28} {', '.join(str(t) for t in times)}")
    draw(arguments.out, rows)
    return 0


def lists(samples: int) -> list[tuple[str, Times]]:
    """(name, timesteps) of every line; of latents they are found for the bundled latent model."""
    pixels, (latents, _) = fastsample.zoo.digits(), fastsample.zoo.latent_digits()
    found = []
    for count in COUNTS:
        for spacing in ("auto", "ays_sd15"):
            found.append((f"{count}: {spacing}", DDIM(pixels.schedule, steps=count, timesteps=spacing).table.times))
        for name, model, clip in (("pixels", pixels, 1.0), ("latents", latents, None)):
            config = model.config
            batch = (samples, config.channels, *config.size)
            times = fastsample.optimal_timesteps(
                model,
                batch,
                count,
                clip=clip,
                samples=samples,
                seed=0,
                progress=False,
                model_kwargs={"y": torch.arange(samples) % config.num_classes},
            )
            found.append((f"{count}: optimal, {name}", times))
    return found


def draw(path: Path, rows: dict[str, Times]) -> None:
    """A line of ticks each."""
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    ratios = sigma_over_alpha(fastsample.zoo.digits().schedule)
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for place, (name, times) in enumerate(reversed(rows.items())):
        axes.plot(ratios[np.array(times, dtype=int)], [place] * len(times), "|-", ms=14, lw=0.5, label=name)
    axes.set_yticks(range(len(rows)), [*reversed(rows)])
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("sigma / alpha: noise on the left, clean data on the right")
    axes.grid(axis="x", alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
