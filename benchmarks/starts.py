"""Where a run starts: Frechet distance over the first timestep, the spacing from there and the number of model calls.

Every point has the same noise, the same balanced labels and the same number of samples, so that points of one model and
one number of calls compare far below the distance's own noise. Samples and rows that are there are not made again.

    python -m benchmarks.starts                                        the bundled model
    python -m benchmarks.starts --schedule linear --search 4           the same network at a linear schedule's levels
    python -m benchmarks.starts --model FILE.safetensors --samplers ddim
"""

from __future__ import annotations

import csv
import hashlib
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsample
from benchmarks.common.report import write_csv
from benchmarks.models.relevelled import Relevelled
from fastsample import DDIM, DDPM, DPMSolver, Euler, Heun, Sampler, Schedule
from fastsample.evaluate import digits_classifier
from fastsample.evaluate.distances import resamples
from fastsample.train import load_data

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddim": DDIM,
    "dpm_solver": DPMSolver,
    "euler": Euler,
    "heun": Heun,
    "ddpm": DDPM,
}
# The defaults before "auto": what it is compared with.
BEFORE = {"ddim": "leading", "dpm_solver": "linspace", "euler": "linspace", "heun": "linspace", "ddpm": "respaced"}
CALLS, SEARCH = "1,2,3,4,5,6,8,10,20,50", "2,4,8"
RATIOS = (3.0, 6.0, 9.0, 12.0, 16.0, 24.0, 32.0, 64.0, np.inf)  # sigma / alpha at the starts of a search
BATCH, DRAWS, SHAPE = 100, 200, (1, 28, 28)


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        spacing: a name that the sampler knows; or, where there is a `start`, how it goes on from there: "trailing"
            round((1 - k / N) (start + 1)) - 1, or "linspace", evenly to 0.
        start: the first timestep, or empty.
        calls: the sampler's rows.
        clip: 1, or empty for none.
    """

    model: str
    sampler: str
    spacing: str
    start: str
    calls: int
    clip: str

    def made(self, model: Any) -> Sampler:
        """The sampler, as its function makes it for this model."""
        schedule = model.schedule
        options: dict[str, Any] = {"clip": float(self.clip) if self.clip else None}
        steps = (self.calls + 1) // 2 if self.sampler == "heun" else self.calls
        if self.sampler == "ddpm":
            options["variance"] = "learned_range"
        if self.start == "":
            return SAMPLERS[self.sampler](schedule, steps=steps, timesteps=self.spacing, **options)
        start = int(self.start)
        t = np.round(np.linspace(start, 0, steps) if self.spacing == "linspace" else _trailing(start, steps))
        return SAMPLERS[self.sampler](schedule, timesteps=t.astype(np.int64), **options)


@dataclass(frozen=True)
class Row(Point):
    """What a point gave, in intervals of 95 % over resampled samples.

    Attributes:
        first: the timestep that it starts from, where sigma / alpha is `ratio` and alpha is `alpha`.
        samples: how many there are.
        distance: the Frechet distance to the 5,000 real digits.
        more: that distance less the one of the default before, over the same resamples.
        read: the share of samples whose label the classifier reads.
    """

    first: float
    ratio: float
    alpha: float
    samples: int
    distance: float
    distance_low: float
    distance_high: float
    more: float
    more_low: float
    more_high: float
    read: float


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = ArgumentParser(
        "python -m benchmarks.starts", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a file of fastsample.zoo.save; the bundled model by default")
    parser.add_argument("--schedule", choices=("linear", "scaled_linear"), help="ask the model at this one's levels")
    parser.add_argument("--samplers", type=_names, default=("ddim",), help=f"of {','.join(SAMPLERS)} (%(default)s)")
    parser.add_argument("--calls", type=_numbers, default=_numbers(CALLS), help=f"the default before and now ({CALLS})")
    parser.add_argument("--search", type=_numbers, default=_numbers(SEARCH), help=f"all starts too ({SEARCH})")
    parser.add_argument(
        "--spacings", type=_names, default=("trailing",), help="of a search (%(default)s); linspace too"
    )
    parser.add_argument("--samples", type=int, default=1000, help="of each point (%(default)s)")
    parser.add_argument("--unclipped", action="store_true", help="without clip=1")
    parser.add_argument("--kept", type=Path, default=Path("build/starts"), help="folder of the samples (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model: Any = fastsample.zoo.digits() if options.model is None else fastsample.zoo.load(options.model)
    name = f"{'digits' if options.model is None else options.model.stem} {digest(model)}"
    if options.schedule is not None:
        model, name = Relevelled(model, getattr(Schedule, options.schedule)()), f"{name} at {options.schedule} levels"
    judge = Judge(model, options.samples, options.kept)
    path = options.out / "starts.csv"
    for sampler in options.samplers:
        clip = "" if options.unclipped else "1"
        points = points_of(name, sampler, model.schedule, options.calls, options.search, options.spacings, clip)
        for point in points:
            rows = read_rows(path)
            if not any(_point(row) == point and row.samples == options.samples for row in rows):
                row = judge.row(point)
                print(f"{row.sampler:<10} {row.calls:>4} calls, {row.spacing} from {row.first:g}: {row.distance:.2f}")
                write_csv(path, [*rows, row])
    return 0


def digest(model: torch.nn.Module) -> str:
    """Six digits that tell a model's weights from others, so that no row stands for a model that has been replaced."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()[:6]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def points_of(
    model: str,
    sampler: str,
    schedule: Schedule,
    calls: Sequence[int],
    search: Sequence[int],
    spacings: Sequence[str],
    clip: str,
) -> Iterator[Point]:
    """The points of a model and a sampler, those of few calls first."""
    for count in sorted({*calls, *search}):
        for spacing in (BEFORE[sampler], "auto"):
            yield Point(model, sampler, spacing, "", count, clip)
        for start in starts_of(schedule, count) if count in search else ():
            for spacing in spacings:
                yield Point(model, sampler, spacing, str(start), count, clip)


def starts_of(schedule: Schedule, calls: int) -> list[int]:
    """The noisiest timesteps where sigma / alpha is at most each of RATIOS, if so many calls fit below them."""
    with np.errstate(divide="ignore"):
        ratio = np.sqrt((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    found = {int(np.flatnonzero(ratio <= most)[-1]) for most in RATIOS if ratio[0] <= most}
    return sorted((start for start in found if start >= calls), reverse=True)


def _trailing(start: int, steps: int) -> NDArray[Any]:
    return (steps - np.arange(steps)) * (start + 1) / steps - 1


class Judge:
    """Samples the points of a model and measures them against real digits."""

    def __init__(self, model: Any, count: int, kept: Path) -> None:
        self.model, self.count, self.kept, self.eye = model, count, kept, digits_classifier()
        data = load_data("mnist5k")
        real = self.eye.look(data.scaled(torch.arange(len(data.images)))).features
        self.real = moments(real.double(), torch.full((len(real),), 1 / len(real)).double())
        drawn = [torch.arange(count), *resamples(count, DRAWS, seed=0)]
        self.weights = [index.bincount(minlength=count).double() / count for index in drawn]
        self.labels = torch.arange(count) % 10

    def row(self, point: Point) -> Row:
        """The point with its measures."""
        table = point.made(self.model).table
        assert table.alpha is not None and table.sigma is not None
        alpha, sigma = float(table.alpha[0]), float(table.sigma[0])
        before = Point(point.model, point.sampler, BEFORE[point.sampler], "", point.calls, point.clip)
        own, read = self.measured(point)
        more = own - self.measured(before)[0]
        distance, low, high = _interval(own)
        by, by_low, by_high = _interval(more)
        return Row(
            **asdict(point),
            first=float(table.times[0]),
            ratio=float(f"{sigma / alpha if alpha else np.inf:.4g}"),
            alpha=float(f"{alpha:.4g}"),
            samples=self.count,
            distance=distance,
            distance_low=low,
            distance_high=high,
            more=by,
            more_low=by_low,
            more_high=by_high,
            read=round(read, 4),
        )

    def measured(self, point: Point) -> tuple[NDArray[Any], float]:
        """The point's distance and those of its resamples, and the share of labels that are read."""
        path = self.kept / f"{'-'.join(map(str, asdict(point).values()))}-{self.count}.npz"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            seen = self.eye.look(self.sampled(point))
            found = seen.features.double()
            values = [frechet_distance(moments(found, weights), self.real) for weights in self.weights]
            np.savez(path, distances=values, read=float((seen.classes == self.labels).float().mean()))
        with np.load(path) as kept:
            return kept["distances"], float(kept["read"])

    @torch.no_grad()
    def sampled(self, point: Point) -> Tensor:
        """The samples, in [-1, 1]."""
        sampler, found = point.made(self.model), []
        for start in range(0, self.count, BATCH):
            y = self.labels[start : start + BATCH]
            x = (len(y), *SHAPE)
            found.append(sampler(self.model, x, seed=5, index=start, model_kwargs={"y": y}).clamp(-1, 1))
        return torch.cat(found)


def moments(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of rows, whose weights sum to 1."""
    mean = weights @ features
    centred = features - mean
    return mean, centred.T @ (centred * weights[:, None])


def frechet_distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)), as evaluate's, but by symmetric matrices: thousands are needed here."""
    values, vectors = torch.linalg.eigh(one[1])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other[1] @ root).clamp(min=0).sqrt().sum()
    return float((one[0] - other[0]).square().sum() + one[1].trace() + other[1].trace() - 2 * shared)


def _interval(values: NDArray[Any]) -> tuple[float, float, float]:
    """The first value and an interval of 95 % about it; resamples, which repeat samples, lie further off on average."""
    low, high = np.quantile(values[1:] - values[1:].mean(), (0.025, 0.975)) + values[0]
    return round(float(values[0]), 3), round(float(low), 3), round(float(high), 3)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of results, none where there is no file."""
    if not path.is_file():
        return []
    kinds = {field.name: {"str": str, "int": int, "float": float}[str(field.type)] for field in fields(Row)}
    with path.open() as file:
        return [Row(**{name: kind(line[name]) for name, kind in kinds.items()}) for line in csv.DictReader(file)]


def _point(row: Row) -> Point:
    return Point(**{field.name: getattr(row, field.name) for field in fields(Point)})


if __name__ == "__main__":
    sys.exit(main())
