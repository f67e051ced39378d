"""The drop-in schedulers of fastsample.integrations.diffusers against those of diffusers, loop by loop.

Each runs its own loop, with torch's generator at the same seed; the noise must be the same bits. What is reported is
the largest difference of what a step returns, by the largest value that the step reads or writes.

Where that is beyond 1e-5, both run in float64 too, with the same noise, which tells three more differences:

theirs    of diffusers' loop from its own in float64
ours      of the drop-in's loop in float32 from diffusers' in float64
formulas  of the drop-in's loop in float64 from diffusers' in float64

Status 1 where such a difference is more than float32's rounding, which is one run's luck and another's bad luck: where
ours is more than four times theirs, or formulas is beyond 1e-9. Such runs are printed.
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.cases.drop_ins import GRIDS, Grid, Run
from benchmarks.common.optional import optional
from benchmarks.common.report import write_csv
from benchmarks.models.of_scheduler import OfScheduler, times_of_sigmas
from benchmarks.peers.schedulers import in_float64, levels_to_float64

SHAPE, SEED = (2, 3, 5, 7), 5
MOST = 1e-5
LUCK = 4
OF_FLOAT64 = 1e-9
Model = Callable[[Tensor, Tensor], Tensor]


class Loop(NamedTuple):
    """What a scheduler computed.

    Attributes:
        states: the sample before each step.
        results: what each step returned, the sample after it first.
        generator: the state of torch's generator after all steps.
    """

    states: list[Tensor]
    results: list[tuple[Tensor, ...]]
    generator: Tensor


@dataclass(frozen=True)
class Row:
    """What was found of a class.

    Attributes:
        scheduler: the class.
        runs, steps: how many loops were compared, and how many steps they have together.
        largest: of the differences that are within 1e-5.
        beyond: how many are not.
        theirs, ours, formulas: the largest of those, as described above.
    """

    scheduler: str
    runs: int
    steps: int
    largest: float
    beyond: int
    theirs: float
    ours: float
    formulas: float


class Beyond(NamedTuple):
    """A loop that is further from diffusers' than 1e-5, in the differences described above."""

    run: Run
    difference: float
    theirs: float
    ours: float
    formulas: float

    @property
    def is_rounding(self) -> bool:
        """Whether it is no more than that of float32."""
        return self.ours <= LUCK * max(self.theirs, MOST) and self.formulas <= OF_FLOAT64


def made(run: Run, drop_in: bool) -> Any:
    """The scheduler, with its timesteps set."""
    if drop_in:
        from fastsample.integrations import diffusers as module

        scheduler = getattr(module, run.scheduler)(**run.options, compat=run.compat)
    else:
        scheduler = getattr(optional("diffusers", "diffusers"), run.scheduler)(**run.options)
    scheduler.set_timesteps(**run.timesteps)
    return scheduler


def model_of(run: Run) -> Model:
    """The same model for both."""
    if run.scheduler == "CMStochasticIterativeScheduler":
        return times_of_sigmas
    return OfScheduler(made(run, False), learned="learned" in str(run.options.get("variance_type")))


def loop(run: Run, *, drop_in: bool, model: Model | None = None, double: bool = False) -> Loop:
    """The whole loop of diffusers' scheduler or of ours, with torch's noise."""
    scheduler, model = made(run, drop_in), model or model_of(run)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(SHAPE, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    if double:
        x = x.double()
    given = dict(run.given)
    if "generator" in type(scheduler).step.__annotations__:
        given["generator"] = generator
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # which flows do not have
    states, results = [], []
    with ExitStack() as stack:
        if double:
            stack.enter_context(_noise_of_float32(type(scheduler)))
            if drop_in:
                levels_to_float64(scheduler)
            else:
                stack.enter_context(in_float64(scheduler))
        for t in scheduler.timesteps:
            states.append(x)
            output = model(scaled(x, t), t.expand(len(x)))
            results.append(scheduler.step(output, t, x, **given, return_dict=False))
            x = results[-1][0]
    return Loop(states, results, generator.get_state())


@contextmanager
def _noise_of_float32(kind: type) -> Iterator[None]:
    """In it a scheduler's noise in float64 is that of float32, whoever of its classes draws it."""
    from diffusers.utils.torch_utils import randn_tensor

    def drawn(shape: torch.Size, *, dtype: torch.dtype, **given: Any) -> Tensor:
        noise: Tensor = randn_tensor(shape, dtype=torch.float32, **given).to(dtype)
        return noise

    modules = {base.__module__ for base in kind.__mro__ if base.__module__.startswith(("diffusers.", "fastsample."))}
    with ExitStack() as stack:
        for name in modules:
            stack.enter_context(patch.object(sys.modules[name], "randn_tensor", drawn, create=True))
        yield


def apart(got: Loop, want: Loop) -> float:
    """The largest difference in a step, by the largest value that the wanted one reads or writes."""
    found = 0.0
    for before, ours, theirs in zip(want.states, got.results, want.results, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            finite = other.isfinite()
            # Where diffusers divides by 0 the drop-in must have what it has.
            if not (torch.equal(one.isfinite(), finite) and torch.equal(_odd(one, ~finite), _odd(other, ~finite))):
                return float("inf")
            largest = max(_largest(tensor) for tensor in (before, theirs[0], other))
            if largest:
                found = max(found, _largest(one.double() - other.double()) / largest)
    return found


def _odd(values: Tensor, where: Tensor) -> Tensor:
    """Those that are not finite, NaN as 0."""
    return values[where].double().nan_to_num(0.0)


def _largest(values: Tensor) -> float:
    """Of those that are finite."""
    return float(torch.where(values.isfinite(), values, 0.0).abs().max())


def difference(run: Run) -> float:
    """That of a run; infinite where the noise is not the same."""
    model = model_of(run)
    got, want = (loop(run, drop_in=drop_in, model=model) for drop_in in (True, False))
    return apart(got, want) if torch.equal(got.generator, want.generator) else float("inf")


def explained(run: Run) -> Beyond:
    """All differences of a run."""
    model = model_of(run)
    ours, theirs = (loop(run, drop_in=drop_in, model=model) for drop_in in (True, False))
    ours_double, judge = (loop(run, drop_in=drop_in, model=model, double=True) for drop_in in (True, False))
    return Beyond(run, difference(run), apart(theirs, judge), apart(ours, judge), apart(ours_double, judge))


def compared(runs: Sequence[Run]) -> tuple[Row, list[Beyond]]:
    """The row of a class whose runs these are, and those that are beyond."""
    differences = [difference(run) for run in tqdm(runs, runs[0].scheduler, unit="run", leave=False, disable=None)]
    beyond = [explained(run) for run, found in zip(runs, differences, strict=True) if not found <= MOST]
    within = max((found for found in differences if found <= MOST), default=0.0)
    worst = [max((getattr(found, name) for found in beyond), default=0.0) for name in ("theirs", "ours", "formulas")]
    return Row(runs[0].scheduler, len(runs), sum(run.steps for run in runs), within, len(beyond), *worst), beyond


def runs_of(grids: Sequence[Grid], most_steps: int) -> list[Run]:
    """The runs of so many steps at most."""
    return [run for grid in grids for run in grid if run.steps <= most_steps]


def main(argv: Sequence[str] | None = None) -> int:
    """Compares all classes, or those whose name holds a text."""
    flags = ArgumentParser(
        "python -m benchmarks.schedulers", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    flags.add_argument("--only", default="", help="a part of the names of classes to run")
    flags.add_argument("--most-steps", type=int, default=1000, help="leaves longer loops out")
    flags.add_argument("--results", type=Path, help="where the rows go, as CSV")
    options = flags.parse_args(argv)
    if optional("diffusers", "diffusers") is None:
        return 2
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    rows, unexplained = [], 0
    for scheduler, grids in GRIDS.items():
        if options.only in scheduler:
            row, beyond = compared(runs_of(grids, options.most_steps))
            rows.append(row)
            unexplained += sum(not found.is_rounding for found in beyond)
            counted = f"{row.runs} runs, {row.steps} steps, {row.largest:.1e}; {row.beyond} beyond"
            print(f"{scheduler}: {counted}", flush=True)
            for found in beyond:
                if not found.is_rounding:
                    print(_line(found), flush=True)
    if options.results and rows:
        write_csv(options.results, rows)
    print(f"{sum(row.runs for row in rows)} runs, {unexplained} that are more than rounding")
    return int(unexplained > 0)


def _line(found: Beyond) -> str:
    told = ", ".join(f"{name} {getattr(found, name):.1e}" for name in ("theirs", "ours", "formulas"))
    return f"  {found.difference:.1e} ({told}) {found.run.name}"


if __name__ == "__main__":
    raise SystemExit(main())
