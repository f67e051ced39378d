"""A robot's action chunk by Diffusion Policy: how long it takes, and how much of that is not the network's.

The network is the published one for states (U-Net of 256, 512, 1024 channels, FiLM), with random weights; a chunk is
16 actions of 7 numbers, the schedule is theirs (100 timesteps, squaredcos_cap_v2, x0 clipped to [-1, 1]).

  diffusers   the published loop: scheduler.step after each call of the network
  drop-in     the same loop, its scheduler from fastsample.integrations.diffusers
  fastsample  a prepared run of the same table
  plain       y = a * y + b * m in torch, of iPNDM's table

diffusers' IPNDMScheduler has a schedule of its own and no limit of x0; there is no drop-in for it. The four steps are
LCMScheduler's. Each chunk is timed alone, all kinds in turn. Outside is a chunk's time less that of its calls of the
network, which are timed one by one inside it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsample
from benchmarks.common import progress
from benchmarks.common.harness import spread
from benchmarks.common.optional import optional
from benchmarks.common.options import Run, begin, parser
from benchmarks.common.report import OURS, write_csv
from benchmarks.models.action_unet import ACTIONS, HORIZON, OBSERVATION, WIDTHS, ActionUNet
from benchmarks.peers.plain_torch import plain_loop

SHAPE = (1, HORIZON, ACTIONS)
PEER, DROP_IN, PLAIN = "diffusers", "drop-in", "plain torch loop"
TIMESTEPS: Mapping[str, Any] = {"num_train_timesteps": 100}
SCHEDULE: Mapping[str, Any] = {**TIMESTEPS, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
# By scheduler and steps, and how many times as many chunks as there are rounds: a hundred steps take seconds.
CASES = (("DDPM", 100, 0.25), ("DDIM", 16, 2), ("DDIM", 10, 2), ("iPNDM", 5, 2), ("LCM", 4, 2))
QUICK_STEPS, QUICK_WIDTHS = 2, (8, 16, 32)
Policy = Callable[..., Tensor]


@dataclass(frozen=True)
class Row:
    """Chunks of one kind.

    Attributes:
        case, provider: the scheduler with its steps, and the kind.
        chunks: how many were timed.
        p50_ms, p99_ms: milliseconds a chunk.
        outside_p20_us, outside_p50_us, outside_p80_us: microseconds a chunk that are not the network's.
        share: the median of the outside's part of a chunk.
        ratio_p20, ratio_p50, ratio_p80: the outside by that of the first kind, round by round.
    """

    case: str
    provider: str
    chunks: int
    p50_ms: float
    p99_ms: float
    outside_p20_us: float
    outside_p50_us: float
    outside_p80_us: float
    share: float
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float


class Timed:
    """A policy that adds up how long its calls take."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.seconds = policy, 0.0

    def __call__(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        start = perf_counter()
        output = self.policy(x, t, observation)
        self.seconds += perf_counter() - start
        return output


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all cases and writes their results."""
    run = begin(parser("benchmarks.policy", __doc__).parse_args(argv))
    if optional("diffusers", "the original loop") is None:
        return 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = ActionUNet(QUICK_WIDTHS if run.quick else WIDTHS).eval().requires_grad_(False)
    rows: list[Row] = []
    with torch.no_grad(), progress.section("policy", run.rounds, run.quick):
        for name, steps, times in CASES:
            steps = min(steps, QUICK_STEPS) if run.quick else steps
            found = compared(run, policy, name, steps, math.ceil(times * run.rounds))
            rows += found
            print(table(found), flush=True)
    write_csv(run.path("policy", ".csv"), rows)
    return 0


def compared(run: Run, policy: Policy, name: str, steps: int, chunks: int) -> list[Row]:
    """Times chunks of all kinds in turn."""
    kinds = kinds_of(name, steps, torch.randn(1, OBSERVATION))
    whole = {kind: np.empty(chunks) for kind in kinds}
    inside = {kind: np.empty(chunks) for kind in kinds}
    timed = {kind: Timed(policy) for kind in kinds}
    calls = {kind: chunk(timed[kind]) for kind, chunk in kinds.items()}
    for call in calls.values():
        call()
    gc.collect()
    for i in range(chunks):
        order = [*calls][i % len(calls) :] + [*calls][: i % len(calls)]
        for kind in order:
            timed[kind].seconds = 0.0
            start = perf_counter()
            calls[kind]()
            whole[kind][i], inside[kind][i] = perf_counter() - start, timed[kind].seconds
    first = next(iter(kinds))
    outside = {kind: whole[kind] - inside[kind] for kind in kinds}
    return [_row(f"{name}, {steps} steps", kind, whole[kind], outside[kind], outside[first]) for kind in kinds]


def kinds_of(name: str, steps: int, observation: Tensor) -> dict[str, Callable[[Policy], Callable[[], Tensor]]]:
    """By kind what makes a policy's chunks, each with noise of its own."""
    seen = {"observation": observation}

    def published(drop_in: bool) -> Callable[[Policy], Callable[[], Tensor]]:
        scheduler = scheduler_of(name, steps, drop_in)
        draws = {} if name == "iPNDM" else {"generator": torch.Generator().manual_seed(0)}
        return lambda policy: lambda: loop(scheduler, steps, policy, observation, draws)

    if name == "iPNDM":
        schedule = fastsample.Schedule.from_alphas_cumprod(scheduler_of("DDIM", steps).alphas_cumprod)
        sampler: Any = fastsample.IPNDM(schedule, steps=steps, clip=1.0)
        return {
            PEER: published(False),
            PLAIN: lambda policy: plain_loop(sampler.table, lambda x, t: policy(x, t, observation), torch.randn(SHAPE)),
            OURS: lambda policy: sampler.prepare(policy, SHAPE, model_kwargs=seen),
        }
    sampler = fastsample.from_diffusers(scheduler_of(name, steps))
    return {
        PEER: published(False),
        DROP_IN: published(True),
        OURS: lambda policy: sampler.prepare(policy, SHAPE, model_kwargs=seen),
    }


def scheduler_of(name: str, steps: int, drop_in: bool = False) -> Any:
    """The scheduler as Diffusion Policy configures it, diffusers' or ours."""
    import diffusers

    from fastsample.integrations import diffusers as drop_ins

    kind = getattr(drop_ins if drop_in else diffusers, f"{name.upper()}Scheduler")
    scheduler = kind(**(TIMESTEPS if name == "iPNDM" else SCHEDULE))
    scheduler.set_timesteps(steps)
    return scheduler


def loop(scheduler: Any, steps: int, policy: Policy, observation: Tensor, draws: Mapping[str, Any]) -> Tensor:
    """A chunk as Diffusion Policy makes it; `draws` holds the generator, where the scheduler's step takes one."""
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, **draws)
    for t in scheduler.timesteps:
        output = policy(x, t, observation)
        x = scheduler.step(output, t, x, **draws).prev_sample
    return x


def _row(
    case: str, kind: str, whole: NDArray[np.float64], outside: NDArray[np.float64], first: NDArray[np.float64]
) -> Row:
    p50, p99 = (1e3 * np.quantile(whole, [0.5, 0.99])).tolist()
    share = float(np.median(outside / whole))
    return Row(case, kind, len(whole), p50, p99, *spread(1e6 * outside), share, *spread(outside / first))


def table(rows: Sequence[Row]) -> str:
    """The rows for a reader."""
    lines = [f"\n{rows[0].case:26} {'p50 ms':>9} {'p99 ms':>9} {'outside us':>11} {'share':>7}"]
    for row in rows:
        line = f"  {row.provider:24} {row.p50_ms:9.3f} {row.p99_ms:9.3f} {row.outside_p50_us:11.1f} {row.share:7.2%}"
        if row is not rows[0]:
            ratio = f"{row.ratio_p50:.2f} [{row.ratio_p20:.2f}, {row.ratio_p80:.2f}]"
            line += f"   {ratio} of the outside of {rows[0].provider}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
