"""A whole sampling run against the same loop around diffusers' scheduler.

Sections, each with a result file of its own:
  loop     a model that takes no time: microseconds a step that are the sampler's
  short    the same model, whole runs of 10 and 50 steps, against a plain torch loop; and how late the slowest runs are
  actions  a 1-D U-Net of about a millisecond, one chunk of 16 actions
  digits   the bundled model under guidance 2, the ten digits
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import fastsample
from benchmarks.cases import methods
from benchmarks.cases.steps import SCHEDULE
from benchmarks.common import progress
from benchmarks.common.harness import Candidate, Timing, measure, ratio, spread
from benchmarks.common.options import Run, begin, parser
from benchmarks.common.report import OURS, Row, percent, plot, rows_of, table, write_csv
from benchmarks.common.sentences import closing
from benchmarks.models.policy import OBSERVATION, ActionUNet
from benchmarks.peers.diffusers import diffusers_loop
from benchmarks.peers.plain_torch import plain_loop
from benchmarks.sections import overhead, short_runs
from fastsample import Sampler

ALONE = "model alone"
GUIDANCE = 2.0
ACTION_RUNS = (
    ("ddim", methods.DDIM_FREE, 10),
    ("ddpm", methods.DDPM_SMALL, 100),
    ("dpm_solver 2M", methods.DPM_SOLVER, 10),
    ("lcm", methods.LCM_FREE, 4),
)
QUICK_STEPS = 2
DIGIT_RUNS = (("ddim", methods.DDIM_FREE, 20), ("dpm_solver 2M", methods.DPM_SOLVER, 10))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections and writes their results."""
    flags = parser("benchmarks.sampler", __doc__, gpus=True)
    sections = {"loop": overhead.section, "short": short_runs.section, "actions": actions, "digits": digits}
    flags.add_argument("--only", choices=sections, help="one section instead of all")
    arguments = flags.parse_args(argv)
    run = begin(arguments)
    with torch.no_grad():
        for name, section in sections.items():
            if arguments.only in (None, name):
                with progress.section(f"sampler-{name}", run.rounds, run.quick):
                    rows = section(run)
                write_csv(run.path(f"sampler-{name}", ".csv"), rows, run.device)
                plot(run.path(f"sampler-{name}", ".png"), rows, f"benchmarks.sampler, {name}", run.device)
                print(f"\n{closing(rows)}", flush=True)
    return 0


def actions(run: Run) -> list[Row]:
    """One action chunk given an observation."""
    rows: list[Row] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = ActionUNet().eval().to(run.device)
    x, observation = (torch.randn(size, device=run.device) for size in (overhead.SHAPE, (1, OBSERVATION)))
    t = torch.full((1,), 500, device=run.device)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return unet(x, t.expand(1).to(x.device), observation)

    for name, method, most in ACTION_RUNS:
        steps = min(most, QUICK_STEPS) if run.quick else most
        sampler = method.sampler(SCHEDULE, steps=steps)
        ours = partial(sampler, unet, x, model_kwargs={"observation": observation})
        theirs = diffusers_loop(method, SCHEDULE, steps, model, x)
        check_agreement(sampler, ours, theirs)
        plain = plain_loop(sampler.table, lambda x, t: unet(x, t, observation), x)
        alone = partial(unet, x, t, observation)
        rows += _compare(run, f"actions {name}", "1x16x7", ours, theirs, plain, alone, steps)
    return rows


def digits(run: Run) -> list[Row]:
    """Digits 0 to 9 under classifier-free guidance."""
    rows: list[Row] = []
    model, labels = fastsample.zoo.digits().to(run.device), torch.arange(10, device=run.device)
    none = torch.full_like(labels, model.config.num_classes)
    both = torch.cat([none, labels])
    x, t = fastsample.ops.randn((10, 1, 28, 28), seed=0, device=run.device), labels.new_full((20,), 500)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        unconditional, conditional = model(torch.cat([x, x]), t.reshape(-1)[:1].expand(20).to(x.device), both)[
            :, :1
        ].chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)

    for name, method, most in DIGIT_RUNS[:1] if run.quick else DIGIT_RUNS:
        steps = min(most, QUICK_STEPS) if run.quick else most
        sampler = method.sampler(model.schedule, steps=steps)
        ours = partial(sampler, model, x, guidance=GUIDANCE, cond={"y": labels}, uncond={"y": none})
        theirs = diffusers_loop(method, model.schedule, steps, guided, x)
        check_agreement(sampler, ours, theirs)
        alone, plain = partial(model, torch.cat([x, x]), t, both), plain_loop(sampler.table, guided, x)
        rows += _compare(run, f"digits {name}, guidance 2", "batch 10", ours, theirs, plain, alone, steps)
    return rows


def check_agreement(sampler: Sampler, ours: Callable[[], Tensor], theirs: Callable[[], Tensor] | None) -> None:
    """Fails unless both give the same sample, where no noise is drawn."""
    if theirs is not None and not any(sampler.table.stochastic):
        torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)


def _compare(
    run: Run,
    benchmark: str,
    shape: str,
    ours: Callable[[], Tensor],
    theirs: Callable[[], Tensor] | None,
    plain: Callable[[], Tensor],
    call_model: Callable[[], Tensor],
    steps: int,
) -> list[Row]:
    """Rows for all, for the model calls alone, and for what each of them takes beyond those."""

    def alone() -> None:
        for _ in range(steps):
            call_model()

    whole = {OURS: ours, overhead.PLAIN: plain, **({} if theirs is None else {"diffusers": theirs})}
    candidates = [*(Candidate(name, call) for name, call in whole.items()), Candidate(ALONE, alone)]
    timings = measure(candidates, run.rounds, clock=run.loop_clock)
    beyond = {f"{name} beyond the model": name for name in whole}
    for key, name in beyond.items():
        timings[key] = Timing(timings[name].seconds - timings[ALONE].seconds, timings[name].calls)
    compared = {name: OURS for name in whole if name != OURS}
    rows = [
        replace(row, claim="share") if row.provider in beyond else row
        for row in rows_of(benchmark, f"{shape}, {steps} steps", timings, {**compared, **beyond})
    ]
    print(table(rows))
    for key, name in beyond.items():
        milliseconds, share = 1e3 * spread(timings[name].seconds).p50, percent(ratio(timings[key], timings[name]))
        print(f"  {name}: {milliseconds:.3g} ms a run, the sampler's share {share}", flush=True)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
