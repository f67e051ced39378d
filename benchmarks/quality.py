"""How good samples are, by sampler and number of model calls, and what a model gives away in bits per dimension.

Every set of samples has the same initial noise and balanced classes, and fastsample.evaluate compares it with mnist5k.
A finished row is in the CSV file at once; the same command goes on with the rows that are missing there, which are told
apart by the model's digest, sampler, timesteps, calls, count, guidance and seed. docs/quality.md says what it shows.
"""

from __future__ import annotations

import csv
import io
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import torch

import fastsample
from benchmarks.common.options import refuse
from benchmarks.common.report import machine
from benchmarks.sections import quality_page, students_page
from benchmarks.sections.quality_cases import AnyCase, StudentCase, plan, students_plan
from benchmarks.sections.quality_rows import BATCH, BitsRow, Row, Run, key, key_of, load, measured
from benchmarks.students import MEASURED
from fastsample.storage.writing import check_writable, replace_text

RESULTS = Path(__file__).with_name("results")
BUNDLED = Path(fastsample.zoo.__file__).with_name("digits.safetensors")
SEED = 0
ROW_SECONDS = 5  # about what the figures of a row take


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, and writes results, curves and pictures."""
    arguments = _parser().parse_args(argv)
    run = Run(arguments.model, "mnist5k", arguments.seed)
    if arguments.workers < 1:
        refuse(f"--workers must be at least 1, got {arguments.workers}")
    if arguments.count is not None and arguments.count < 10:
        refuse(f"--count must be at least 10, got {arguments.count}")
    try:
        model = load(run.model)
        check_writable(arguments.out)
    except (OSError, ValueError) as error:
        refuse(str(error))
    if (model.config.channels, *model.config.size) != (1, 28, 28):
        refuse(f"{run.model} is no model of digits, 1 x 28 x 28")
    if arguments.students == []:
        arguments.students = [path for path in fastsample.zoo.STUDENTS.values() if path.is_file()] + arguments.also
    if arguments.write and (arguments.model != BUNDLED or arguments.quick):
        refuse("--write is for the whole study of the bundled model")
    torch.set_num_threads(1)
    places = Places(arguments.out, "students" if arguments.students else run.name, arguments.quick)
    sizes = {"quick": arguments.quick, "count": arguments.count}
    every = students_plan(arguments.students, **sizes) if arguments.students else plan(model, **sizes)
    cases = [case for case in every if any(part in str(case) for part in arguments.match or [""])]
    done = {key_of(row) for path in places.tables for row in read(path)}
    missing = [case for case in cases if key(case, run) not in done]
    _print_plan(cases, missing, run, arguments.workers)
    for row in rows(missing, run, arguments.workers):
        append(places.bits if isinstance(row, BitsRow) else places.samples, row)
    # A file may also hold rows of an earlier model of this name, or of spacings that are no sampler's default any more.
    wanted = {key(case, run) for case in every}
    if arguments.students:
        kept = {f"digits-{name}" for name in MEASURED}
        every_row = read(places.samples)
        rows_of_students = [row for row in every_row if key_of(row) in wanted or row["sampler"] in kept]
        place = {key(case, run): number for number, case in enumerate(every)}
        rows_of_students.sort(key=lambda row: place.get(key_of(row), len(place)))
        distilled = [case for case in every if isinstance(case, StudentCase)]
        students_page.show(places.grid, rows_of_students, distilled, run, arguments.write)
        return 0
    samples, bits = ([row for row in read(path) if key_of(row) in wanted] for path in places.tables)
    quality_page.draw(places.curves, samples, run)
    if not arguments.match:
        quality_page.draw_grid(places.grid, run, quick=arguments.quick)
    if arguments.write:
        quality_page.write(samples, bits)
    return 0


class Places:
    """The files of a model's results; those of a quick run never replace measured ones."""

    def __init__(self, folder: Path, model: str, quick: bool) -> None:
        end = f"{model}{'-quick' if quick else ''}"
        self.samples, self.bits = folder / f"quality-{end}.csv", folder / f"quality-bits-{end}.csv"
        self.curves, self.grid = folder / f"quality-{end}.png", folder / f"quality-grid-{end}.png"
        self.tables = (self.samples, self.bits)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "python -m benchmarks.quality", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=BUNDLED, help="a model of digits by fastsample train (the bundled)"
    )
    parser.add_argument("--quick", action="store_true", help="300 samples, up to 50 calls: minutes on two cores")
    parser.add_argument(
        "--students", type=Path, nargs="*", metavar="FILE", help="students of the bundled model (its shipped ones)"
    )
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], metavar="FILE", help="with --students: further ones beside these"
    )
    parser.add_argument("--count", type=int, help="samples of every row instead of the study's own numbers")
    parser.add_argument("--match", action="append", help="only cases whose text contains this; may be repeated")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes of a thread each (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="of all noise (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    parser.add_argument("--write", action="store_true", help="also the tables of docs/quality.md, from the CSV files")
    return parser


def rows(cases: Sequence[AnyCase], run: Run, workers: int) -> Iterator[Row | BitsRow]:
    """The rows of all cases as they are finished; with one worker in this process."""
    if not cases:
        return
    start, ms, done = perf_counter(), _ms_per_image_call(run), 0.0
    every = _seconds(cases, run, ms)
    for case, row in _measured(cases, run, workers):
        done += _seconds([case], run, ms)
        elapsed = perf_counter() - start
        print(f"{elapsed:7.0f} s  {_line(row)}  about {elapsed * (every / done - 1):.0f} s left", flush=True)
        yield row


def _measured(cases: Sequence[AnyCase], run: Run, workers: int) -> Iterator[tuple[AnyCase, Row | BitsRow]]:
    if workers == 1:
        yield from ((case, measured(case, run)) for case in cases)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs: dict[Future[Row | BitsRow], AnyCase] = {pool.submit(measured, case, run): case for case in cases}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as text; none where there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Row | BitsRow) -> None:
    """Adds a row with the machine's columns. All or nothing: a process that is killed leaves whole rows."""
    record = {name: _text(value) for name, value in {**asdict(row), **machine()}.items()}
    text = io.StringIO()
    writer = csv.DictWriter(text, list(record), lineterminator="\n")
    writer.writeheader()
    writer.writerows([*read(path), record])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text.getvalue())


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _print_plan(cases: Sequence[AnyCase], missing: Sequence[AnyCase], run: Run, workers: int) -> None:
    print(f"{run.name}: {len(cases)} rows, {len(cases) - len(missing)} of them there already")
    if missing:
        ms, calls = _ms_per_image_call(run), sum(case.image_calls(load(run.model)) for case in missing)
        print(
            f"{calls:,} image-calls of {ms:.2f} ms each on one thread, measured now, and about {ROW_SECONDS} s a row "
            f"for its figures: about {_seconds(missing, run, ms) / workers:.0f} s by {workers} workers",
            flush=True,
        )


def _seconds(cases: Iterable[AnyCase], run: Run, ms: float) -> float:
    """Of one core, for these cases, where the model takes so many milliseconds for each image."""
    return sum(ROW_SECONDS + 1e-3 * ms * case.image_calls(load(run.model)) for case in cases)


@torch.inference_mode()
def _ms_per_image_call(run: Run) -> float:
    model, x, t = load(run.model), torch.zeros(BATCH, 1, 28, 28), torch.full((BATCH,), 500)
    times = []
    for _ in range(4):  # the first warms up
        start = perf_counter()
        model(x, t)
        times.append(perf_counter() - start)
    return 1e3 * min(times[1:]) / BATCH


def _line(row: Row | BitsRow) -> str:
    if isinstance(row, BitsRow):
        what = f"bits, {row.variance}"
        return f"{what:<28} {row.calls:>4} calls {row.count:>5} digits  {row.bits:.4f} +- {row.standard_error:.4f}"
    guided = f", g {row.guidance:g}" if row.guidance != 1 else ""
    return (
        f"{row.sampler + guided:<28} {row.calls:>4} calls {row.count:>5} samples  Frechet {row.frechet:.2f} "
        f"({row.frechet_low:.2f} .. {row.frechet_high:.2f})  kernel {row.kernel:.4f}  classes {row.class_agreement:.3f}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
