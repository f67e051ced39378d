"""The seven figures of Improved DDPM (Nichol & Dhariwal 2021) from our models, and what the literature says.

The models are those that `python -m benchmarks.siblings --out FOLDER` has trained, and for figure 7 the bundled one,
which `python -m benchmarks.quality` has measured. A finished row is in its CSV file at once; the same command goes on
with what is missing. Rows of other weights of the same name are dropped, and those of samplers that by now start at
another timestep are measured again. Without --siblings nothing is measured, and
figures and page are made again from the CSV files.

The plan: 1.8 million image-calls, of 0.25 ms each on a core of its own and 0.6 ms on a busy machine. In seconds of one
core, in either case: bits of 400 digits in 100 steps, 6 models, 60 to 145; bits of 40 digits in all T steps, 90 to 215;
samples of one model by four samplers in 10 to 100 steps, 1,000 each, 180 to 430; late starts of two models in 50 steps,
1,000 samples each, 110 to 265; the distances of 29 sets of samples, 50. In all 8 to 18 minutes.
"""

from __future__ import annotations

import csv
import io
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.common.options import refuse
from benchmarks.common.report import machine
from benchmarks.sections import improved_bits, improved_figures, improved_page, improved_samples, improved_training
from benchmarks.sections.improved_bits import BitsCase
from benchmarks.sections.improved_data import Data, Places, read
from benchmarks.sections.improved_samples import SAMPLERS, SamplesCase, start_of
from benchmarks.sections.improved_siblings import WEIGHTS, Sibling
from benchmarks.sections.quality_cases import LEARNED, VARIANCES
from benchmarks.siblings import SIBLINGS
from fastsample.storage.writing import check_writable, replace_text

RESULTS = Path(__file__).with_name("results")
SEED = 0
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

Case = BitsCase | SamplesCase
_CASE = ("model", "variance", "sampler", "steps", "skipped", "count", "seed", "what", "x")


class Extent:
    """How much is measured: the study, or with `quick` a smoke run."""

    def __init__(self, *, quick: bool) -> None:
        self.reference, self.draws = ("mnist5k-held-out", 10) if quick else ("mnist5k", 200)
        self.steps, self.most_steps = (5, 40) if quick else (100, 10**6)
        self.digits, self.fewer_digits, self.samples = (4, 4, 12) if quick else (400, 40, 1000)
        self.calls: tuple[int, ...] = (2, 5) if quick else (10, 20, 50, 100)
        self.late_steps = 5 if quick else 50
        self.shares = (0.0, 0.2) if quick else SHARES


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing, and makes figures and page."""
    arguments = _parser().parse_args(argv)
    if arguments.write and arguments.quick:
        refuse("--write is for the whole study")
    if not 0 <= arguments.seed < 2**63:
        refuse(f"--seed must lie in [0, 2^63), got {arguments.seed}")
    try:
        check_writable(arguments.out)
        siblings = {} if arguments.siblings is None else found(arguments.siblings)
    except (OSError, ValueError) as error:
        refuse(str(error))
    torch.set_num_threads(1)
    places = Places(arguments.out, quick=arguments.quick)
    _measure(arguments, siblings, places)
    data = Data(places)
    _replace(places.schedules, list(improved_figures.schedule_rows()))
    drawn = improved_figures.draw(improved_page.PICTURES if arguments.write else arguments.out, data)
    for path in drawn:
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    if arguments.write:
        improved_page.write(data, drawn)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "python -m benchmarks.improved_ddpm", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--siblings", type=Path, help="folder of benchmarks.siblings; what it has of them is measured")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few steps, digits and samples")
    parser.add_argument("--seed", type=int, default=SEED, help="of all noise (%(default)s)")
    parser.add_argument("--write", action="store_true", help="also docs/improved-ddpm.md and its pictures")
    return parser


def found(folder: Path) -> dict[str, Sibling]:
    """The siblings in a folder, by name.

    Raises:
        FileNotFoundError: there is none. ValueError: a file that is no model, or one of other images than digits.
    """
    siblings = {name: Sibling(folder / name) for name in SIBLINGS if (folder / name / WEIGHTS).is_file()}
    if not siblings:
        raise FileNotFoundError(f"no model in {folder}: python -m benchmarks.siblings --out {folder} trains them")
    for sibling in siblings.values():
        config = sibling.load().config
        if (config.channels, *config.size, config.num_classes) != (1, 28, 28, 10):
            raise ValueError(f"{sibling.folder} has no model of ten digits, 1 x 28 x 28")
    return siblings


def plan(siblings: Mapping[str, Sibling], extent: Extent) -> list[Case]:
    """All cases of these siblings, each once, in order."""
    cases: list[Case] = []
    for name, sibling in siblings.items():
        model = sibling.load()
        variances = VARIANCES if model.config.learned_variance else VARIANCES[1:]
        cases.append(BitsCase(name, variances, min(extent.steps, model.schedule.T - 1), extent.digits))
        # Three variances of thousands of steps would be hours, or gigabytes of remembered outputs.
        few = variances if name == "hybrid" or len(variances) < len(VARIANCES) else variances[:1]
        cases.append(BitsCase(name, few, min(model.schedule.T, extent.most_steps), extent.fewer_digits))
    if "hybrid" in siblings:
        every = product(SAMPLERS, extent.calls)
        cases += [SamplesCase("hybrid", sampler, calls, 0.0, extent.samples) for sampler, calls in every]
    for name in ("linear", "hybrid"):
        if name in siblings:
            late = (name, LEARNED, extent.late_steps)
            cases += [SamplesCase(*late, share, extent.samples) for share in extent.shares]
    return list(dict.fromkeys(cases))


def _measure(arguments: Namespace, siblings: Mapping[str, Sibling], places: Places) -> None:
    for path in places.measured:
        kept = [row for row in read(path) if row["model"] not in siblings or _current(row, siblings)]
        if kept != read(path):
            _replace(path, kept)
    extent, seed = Extent(quick=arguments.quick), arguments.seed
    cases = [case for case in plan(siblings, extent) if not _done(case, siblings[case.model], seed, places)]
    calls, done, start = sum(case.image_calls() for case in cases), 0, perf_counter()
    print(f"{len(cases)} cases are missing, {calls:,} image-calls: about {0.25e-3 * calls:.0f} s", flush=True)
    with torch.inference_mode():
        for case in cases:
            sibling = siblings[case.model]
            if isinstance(case, BitsCase):
                _append(places.bits, improved_bits.measured(case, sibling, seed))
            else:
                row = improved_samples.measured(case, sibling, seed, extent.reference, extent.draws)
                _append(places.samples, iter([row]))
            done += case.image_calls()
            seconds = perf_counter() - start
            print(f"{seconds:6.0f} s  {case}  about {seconds * (calls - done) / done:.0f} s left", flush=True)
    trained = {row["model"] for row in read(places.training)}
    for name in improved_training.CURVES:
        if name in siblings and name not in trained:
            _append(places.training, improved_training.measured(siblings[name]))


def _current(row: Mapping[str, str], siblings: Mapping[str, Sibling]) -> bool:
    return row["digest"] == siblings[row["model"]].digest


def _done(case: Case, sibling: Sibling, seed: int, places: Places) -> bool:
    """Whether the files have all rows of a case."""
    columns = {**_columns(case), "seed": str(seed)}
    if isinstance(case, BitsCase):
        rows, wanted = read(places.bits), [{**columns, "variance": name} for name in case.variances]
    else:
        rows, wanted = read(places.samples), [{**columns, "start": _text(start_of(case, sibling))}]
    return all(any(columns.items() <= row.items() for row in rows) for columns in wanted)


def _columns(case: Case) -> dict[str, str]:
    return {name: _text(value) for name, value in asdict(case).items() if name != "variances"}


def _append(path: Path, rows: Iterator[Any]) -> None:
    """Adds dataclass rows, in place of earlier ones of the same case. A process that is killed leaves whole cases."""
    added = [{name: _text(value) for name, value in asdict(row).items()} | _machine() for row in rows]
    same = {_case_of(row) for row in added}
    _replace(path, [*(row for row in read(path) if _case_of(row) not in same), *added])


@cache
def _machine() -> dict[str, str]:
    return {name: str(value) for name, value in machine().items() if name in ("cpu", "torch", "git", "date")}


def _case_of(row: Mapping[str, str]) -> tuple[str | None, ...]:
    return tuple(row.get(name) for name in _CASE)


def _replace(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text.getvalue())


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return str(value)


if __name__ == "__main__":
    raise SystemExit(main())
