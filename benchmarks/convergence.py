"""How fast the error falls with the number of steps; nothing is timed.

order      on a Gaussian mixture whose noise is known, against the exact solution of the ODE, float64, the steps even in
           log SNR between two fixed noise levels
roundtrip  the bundled digits model: ddim_invert, then ddim, with the default timesteps and with as many up to t = 900:
           more "leading" timesteps also reach closer to T, where log SNR falls steeply
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastsample
from benchmarks.common.options import begin, parser
from benchmarks.common.report import pyplot_for, write_csv
from benchmarks.models.mixture import Mixture
from fastsample import DDIM, DEIS, IPNDM, DDIMInverse, DPMSolver, Heun, Sampler, Schedule, UniPC, spaced_timesteps
from fastsample.storage.writing import replacing
from fastsample.times.timesteps import Timesteps

LOG_SNR = (-8.0, 6.0)  # from nearly pure noise to nearly clean data: log(alpha^2 / sigma^2)
STEPS, QUICK_STEPS = (4, 8, 16, 32, 64, 128, 256, 512), (16, 32, 64)
ROUNDTRIP_STEPS, QUICK_ROUNDTRIP_STEPS = (10, 20, 50, 100), (2, 4)
FITTED = 4  # so many of the finest runs tell the slope
FAMILIES: Mapping[str, Callable[..., Sampler]] = {
    "DDIM": DDIM,
    "DPM-Solver++ 2M": partial(DPMSolver, order=2, lower_order_final=False),
    "DPM-Solver++ 3M": partial(DPMSolver, order=3, lower_order_final=False),
    "Heun": Heun,
    "UniPC-2": partial(UniPC, order=2, lower_order_final=False),
    "UniPC-3": partial(UniPC, order=3, lower_order_final=False),
    "DEIS-tAB3": partial(DEIS, order=3, lower_order_final=False),
    "iPNDM-4": partial(IPNDM, order=4),
}


@dataclass(frozen=True)
class Point:
    """One sampler at one number of steps.

    Attributes:
        study, sampler: what was studied.
        steps, calls: from one timestep to the next, and model calls for them.
        error: root mean square; of the round trip relative to the images'.
        slope: of log error over log steps, from the last points; the sampler's order with its sign changed.
    """

    study: str
    sampler: str
    steps: int
    calls: int
    error: float
    slope: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both studies and writes the results."""
    run = begin(parser("benchmarks.convergence", __doc__).parse_args(argv))
    with torch.no_grad():
        points = [
            *order(QUICK_STEPS if run.quick else STEPS),
            *(roundtrip(QUICK_ROUNDTRIP_STEPS, 4) if run.quick else roundtrip(ROUNDTRIP_STEPS, 50)),
        ]
    for point in points:
        print(
            f"{point.study:<10} {point.sampler:<16} {point.steps:>4} steps {point.calls:>5} calls  "
            f"error {point.error:.3g}, slope {point.slope:.2f}"
        )
    write_csv(run.path("convergence", ".csv"), points)
    plot(run.path("convergence", ".png"), points)
    return 0


def order(counts: Sequence[int]) -> list[Point]:
    """The error at the last of N + 1 timesteps, for every sampler and N; all counts must divide the largest.

    3M as published (dpm-solver, diffusers) weighs its second difference by half of what Taylor's formula asks for: it
    has the smallest errors here, but order 2.
    """
    log_snr = np.linspace(LOG_SNR[1], LOG_SNR[0], max(counts) + 1)
    mixture = Mixture(Schedule.from_alphas_cumprod(1 / (1 + np.exp(-log_snr))))
    last = mixture.schedule.T - 1
    x = mixture.quantile(torch.linspace(0.01, 0.99, 199, dtype=torch.float64)[:, None], last)
    exact = mixture.flow(x, last, 0)
    points = []
    for name, make in FAMILIES.items():
        errors, calls = [], []
        for count in counts:
            sampler = make(mixture.schedule, timesteps=range(0, last + 1, last // count))
            errors.append(_rms(_before_last_row(sampler, mixture, x) - exact))
            calls.append(len(sampler.table) - 1)
        points += _points("order", name, counts, calls, errors)
    return points


def _before_last_row(sampler: Sampler, model: Mixture, x: Tensor) -> Tensor:
    """The state at the last timestep. The row from there to clean data is longer, and the same for all."""
    rows = sampler.iterate(model, x, model_dtype=torch.float64)
    for _ in range(len(sampler.table) - 1):
        step = next(rows)
    return step.x


def roundtrip(counts: Sequence[int], image_steps: int) -> list[Point]:
    """Ten digits, encoded and decoded with their labels."""
    model, labels = fastsample.zoo.digits(), {"y": torch.arange(10)}
    images = DDIM(model.schedule, steps=image_steps, timesteps="leading")(model, (10, 1, 28, 28), model_kwargs=labels)
    spacings: dict[str, Callable[[int], Timesteps]] = {
        "DDIM, leading": partial(spaced_timesteps, model.schedule.T, "leading"),
        "DDIM, 0 to 900": lambda count: np.linspace(0, 900, count).round().astype(np.int64),
    }
    points = []
    for name, spacing in spacings.items():
        errors = []
        for count in counts:
            t = spacing(count)
            noise = DDIMInverse(model.schedule, timesteps=t)(model, images, model_kwargs=labels)
            back = DDIM(model.schedule, timesteps=t)(model, noise, model_kwargs=labels)
            errors.append(_rms(back - images) / _rms(images))
        points += _points("roundtrip", name, counts, [2 * count for count in counts], errors)
    return points


def _points(
    study: str, sampler: str, steps: Sequence[int], calls: Sequence[int], errors: Sequence[float]
) -> list[Point]:
    slope = float(np.polyfit(np.log(steps[-FITTED:]), np.log(errors[-FITTED:]), 1)[0])
    return [Point(study, sampler, *values, slope) for values in zip(steps, calls, errors, strict=True)]


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def plot(path: Path, points: Sequence[Point]) -> None:
    """Error over steps, a panel for each study, as a PNG."""
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    studies = {"order": "Gaussian mixture: error against the exact ODE", "roundtrip": "digits: encoded and decoded"}
    figure, panels = pyplot.subplots(1, len(studies), figsize=(11, 4.5), layout="constrained")
    for (study, title), axes in zip(studies.items(), panels, strict=True):
        studied = [point for point in points if point.study == study]
        for sampler in dict.fromkeys(point.sampler for point in studied):
            line = [point for point in studied if point.sampler == sampler]
            axes.loglog(
                [point.steps for point in line],
                [point.error for point in line],
                "o-",
                label=f"{sampler}: slope {line[0].slope:.2f}",
            )
        axes.set(title=title, xlabel="steps", ylabel="root mean square error")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
