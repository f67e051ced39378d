"""What was measured for docs/improved-ddpm.md, by model, sampler and steps. What is not there: LookupError."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import fastsample
from benchmarks.sections.improved_bits import numbers
from benchmarks.sections.quality_rows import digest_of
from fastsample.evaluate import Figure

BUNDLED, WEIGHTS = "bundled", Path(fastsample.zoo.__file__).with_name("digits.safetensors")
_STANDARD = 1.645  # standard errors from the mean to 5 or 95 %

Row = Mapping[str, str]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as text; none where there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Places:
    """The files of the study; those of a quick run never replace measured ones."""

    def __init__(self, folder: Path, *, quick: bool = False) -> None:
        end = "-quick.csv" if quick else ".csv"
        self.bits, self.samples = folder / f"improved-ddpm-bits{end}", folder / f"improved-ddpm-samples{end}"
        self.training = folder / f"improved-ddpm-training{end}"
        self.schedules = folder / f"improved-ddpm-schedules{end}"
        # Those of the bundled model, which benchmarks.quality has measured.
        self.quality, self.quality_bits = folder / "quality-digits.csv", folder / "quality-bits-digits.csv"
        self.measured = (self.bits, self.samples, self.training)


class Data:
    """All rows of these files."""

    def __init__(self, places: Places) -> None:
        self.bits, self.samples, self.training = map(read, places.measured)
        # A file may also hold rows of an earlier model of this name.
        samples, self.quality_bits = (
            [row for row in read(path) if row["digest"] == digest_of(WEIGHTS)]
            for path in (places.quality, places.quality_bits)
        )
        self.quality = [row for row in samples if float(row["guidance"]) == 1]

    def distance(
        self, model: str, sampler: str, calls: int, *, skipped: float = 0.0, name: str = "frechet", few: bool = False
    ) -> Figure:
        """A distance; with `few` that of the fewest samples there are."""
        if model == BUNDLED:
            found = [row for row in self.quality if (row["sampler"], row["calls"]) == (sampler, str(calls))]
        else:
            wanted = (model, sampler, str(calls), skipped)
            found = [
                row
                for row in self.samples
                if (row["model"], row["sampler"], row["steps"], float(row["skipped"])) == wanted
            ]
        if not found:
            raise LookupError(f"no samples of {model} by {sampler} in {calls} steps")
        # Of equal ones the last: an earlier one started elsewhere.
        row = (min if few else max)(reversed(found), key=lambda row: int(row["count"]))
        return Figure(*(float(row[f"{name}{end}"]) for end in ("", "_low", "_high")))

    def calls(self, model: str, sampler: str) -> list[int]:
        """The numbers of model calls for which there are samples of whole runs."""
        if model == BUNDLED:
            return sorted({int(row["calls"]) for row in self.quality if row["sampler"] == sampler})
        own = (row for row in self.samples if (row["model"], row["sampler"]) == (model, sampler))
        return sorted({int(row["steps"]) for row in own if float(row["skipped"]) == 0})

    def late_starts(self, model: str) -> tuple[int, list[float]]:
        """(steps of the whole process, the shares that were skipped) with the first share, 0; LookupError for none."""
        late = [row for row in self.samples if row["model"] == model and float(row["skipped"]) > 0]
        if not late:
            raise LookupError(f"no late starts of {model}")
        return int(late[-1]["steps"]), sorted({0.0, *(float(row["skipped"]) for row in late)})

    def bound(self, model: str, variance: str, steps: int) -> Row:
        """The row of a bound in bits per dimension."""
        wanted = (model, variance, str(steps))
        found = [row for row in self.bits if (row["model"], row["variance"], row["steps"]) == wanted]
        if not found:
            raise LookupError(f"no bits of {model} with {variance} in {steps} steps")
        return found[-1]

    def bits_of(self, model: str, variance: str, steps: int) -> Figure:
        """Their mean and interval."""
        if model == BUNDLED:
            rows = [row for row in self.quality_bits if (row["variance"], row["calls"]) == (variance, str(steps))]
            if not rows:
                raise LookupError(f"no bits of the bundled model with {variance} in {steps} steps")
            value, half = float(rows[-1]["bits"]), _STANDARD * float(rows[-1]["standard_error"])
            return Figure(value, value - half, value + half)
        row = self.bound(model, variance, steps)
        return Figure(float(row["bits"]), float(row["low"]), float(row["high"]))

    def each(self, model: str, variance: str, steps: int) -> NDArray[np.float64]:
        """The bits of every digit."""
        return numbers(self.bound(model, variance, steps)["each"])

    def whole(self) -> list[Row]:
        """Bounds of whole processes, whose terms are known one by one."""
        return [row for row in self.bits if row["terms"]]

    def steps_of(self, model: str) -> tuple[int, int]:
        """The steps of the respaced and of the whole process that a model's bits were measured on."""
        own = [row for row in self.bits if row["model"] == model]
        whole, respaced = ({int(row["steps"]) for row in own if bool(row["terms"]) is full} for full in (True, False))
        if not whole or not respaced:
            raise LookupError(f"no bits of {model}")
        return max(respaced), max(whole)

    def course(self, model: str, what: str) -> Sequence[Row]:
        """The numbers of a training."""
        return [row for row in self.training if (row["model"], row["what"]) == (model, what)]

    def spread(self, model: str) -> Figure:
        """How far the loss jumps."""
        rows = self.course(model, "spread")
        if not rows:
            raise LookupError(f"no training of {model}")
        return Figure(*(float(rows[-1][name]) for name in ("value", "low", "high")))
