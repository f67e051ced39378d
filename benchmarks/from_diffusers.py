"""fastsample.from_diffusers against the live schedulers that it reads; nothing is timed.

A line for each configuration with two differences of results from one seed, with the same noise, each by the largest
value of the scheduler's result:

sample  of the sampler's from the scheduler's in float32. Where that loses digits of its own, from it in float64, and
        the line says why.
rows    of the sampler's table from the scheduler, both in float64: whether the formulas are the same.

Status 1 where a sample is beyond 1e-5, or rows are beyond 5e-6: CMStochasticIterativeScheduler rounds its smallest
sigma to float32, and adds noise for what that is more.
"""

from __future__ import annotations

import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastsample
from benchmarks.cases.schedulers import CASES, Case
from benchmarks.common.optional import optional
from benchmarks.models.of_scheduler import OfScheduler, times_of_sigmas
from benchmarks.peers.schedulers import chain
from fastsample import Table, ops
from fastsample.ops.noise import STEP
from fastsample.ops.step.reference import step_reference

SHAPE, SEED = (2, 3, 8, 8), 5
MOST_OF_SAMPLES, MOST_OF_ROWS = 1e-5, 5e-6


class Difference(NamedTuple):
    """What was found, by the largest value of the scheduler's result.

    Attributes:
        sample, rows: as described above.
        theirs: of the scheduler's result in float32 from its own in float64.
    """

    sample: float
    rows: float
    theirs: float


def difference(case: Case) -> Difference:
    """The results of one configuration, ours from an x_T of its own."""
    model = model_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of starts next to pure noise, or far from it, which are the scheduler's
        sampler = fastsample.from_diffusers(made(case), case.steps, eta=case.eta, **case.arguments)
        sample = sampler(model, SHAPE, seed=SEED)
    single, double = live(case, double=False), live(case, double=True)
    want = double if case.float64 else single
    return Difference(apart(sample, want), apart(in_float64(sampler.table, model), double), apart(single, double))


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, by the largest value of `want`."""
    return float((got.double() - want).abs().max() / want.abs().max())


def in_float64(table: Table, model: Any) -> Tensor:
    """A run through the rows in plain torch."""
    x = table.init_noise_sigma * ops.randn(SHAPE, seed=SEED).double()
    history: list[Tensor] = []
    for k, t in enumerate(table.times):
        m = model(float(table.e[k]) * x, torch.full((len(x),), t))
        z = ops.randn(SHAPE, seed=SEED, step=k, stream=STEP).double()
        x, entry = step_reference(x, m, table, k, z=z, history=history)[:2]
        history = [entry, *history][:3]
    return x


def made(case: Case) -> Any:
    """The scheduler, without timesteps."""
    diffusers = optional("diffusers", "diffusers")
    return getattr(diffusers, f"{case.scheduler}Scheduler")(**case.options)


def model_of(case: Case) -> Any:
    """The same model for both."""
    if case.scheduler == "CMStochasticIterative":
        return times_of_sigmas
    return OfScheduler(made(case), learned="learned" in str(case.options.get("variance_type")))


def live(case: Case, double: bool) -> Tensor:
    """The scheduler's own result."""
    scheduler = made(case)
    if case.steps is not None or case.arguments:
        given = {} if case.steps is None else {"num_inference_steps": case.steps}
        scheduler.set_timesteps(**given, **case.arguments)
    drawn = ops.randn(SHAPE, seed=SEED).double() if double else ops.randn(SHAPE, seed=SEED)
    x = drawn * float(getattr(scheduler, "init_noise_sigma", 1.0))
    eta = {} if case.eta is None else {"eta": case.eta}
    return chain(scheduler, model_of(case), x, seed=SEED, double=double, **eta)


def main(argv: Sequence[str] | None = None) -> int:
    """Compares all configurations, or those whose name holds a text."""
    flags = ArgumentParser(
        "python -m benchmarks.from_diffusers", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    flags.add_argument("--only", default="", help="a part of the names of configurations to run")
    options = flags.parse_args(argv)
    if optional("diffusers", "diffusers") is None:
        return 2
    cases = [case for case in CASES if options.only in case.name]
    differences = [_shown(case) for case in cases]
    beyond = sum(not (found.sample <= MOST_OF_SAMPLES and found.rows <= MOST_OF_ROWS) for found in differences)
    largest = [max((getattr(found, name) for found in differences), default=0.0) for name in ("sample", "rows")]
    print(
        f"{len(cases)} configurations, {beyond} beyond; the largest differences are {largest[0]:.1e}, {largest[1]:.1e}"
    )
    return int(beyond > 0)


def _shown(case: Case) -> Difference:
    found = difference(case)
    why = f"   (against float64: its float32 is {found.theirs:.1e} off, since {case.float64})" if case.float64 else ""
    print(f"{found.sample:.1e} {found.rows:.1e}  {case.name}{why}", flush=True)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
