"""A robot's action chunk by Diffusion Policy: how long it takes, and how much of that is not the network's.

The network is the published one for states (U-Net of 256, 512, 1024 channels, FiLM), with random weights; a chunk is
16 actions of 7 numbers, the schedule is theirs (100 timesteps, squaredcos_cap_v2, x0 clipped to [-1, 1]).

  diffusers   the published loop: scheduler.step after each call of the network
  drop-in     the same loop, its scheduler from fastsample.integrations.diffusers
  fastsample  a prepared run of the same table, given the observation at the call
  plain       iPNDM in plain torch; diffusers' has levels of its own and clips nothing, and stands there for its time

"receding" is a whole tick of an episode: the observation is normalised, a chunk is made by four of ten steps from what
is left of the last one, and half of it is clipped and brought to the joints' units.

Each chunk is timed alone, all kinds in turn. Outside is a chunk's time less that of its calls of the network, which
are timed one by one inside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.cases.policy import RECEDING, Policy, kinds_of
from benchmarks.common import progress
from benchmarks.common.harness import Candidate, measure, spread, wall
from benchmarks.common.optional import optional
from benchmarks.common.options import begin, parser
from benchmarks.common.report import machine, write_csv
from benchmarks.models.action_unet import OBSERVATION, WIDTHS, ActionUNet

# By name and steps, and how many times as many chunks as there are rounds: a hundred steps take seconds.
CASES = (("DDPM", 100, 0.1), ("DDIM", 16, 0.75), ("DDIM", 10, 1), ("iPNDM", 5, 1), ("LCM", 4, 1), (RECEDING, 10, 1))
QUICK_STEPS, QUICK_WIDTHS = 5, (8, 16, 32)


@dataclass(frozen=True)
class Row:
    """Chunks of one kind.

    Attributes:
        case, provider: the scheduler with its steps, and the kind.
        chunks: how many were timed; of few, p99 is about the slowest.
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
    here = machine()
    print(f"{here['cpu']} ({here['cpu_family']}), {here['threads']} threads")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = ActionUNet(QUICK_WIDTHS if run.quick else WIDTHS).eval().requires_grad_(False)
    rows: list[Row] = []
    with torch.no_grad(), progress.section("policy", run.rounds, run.quick):
        for name, steps, times in CASES:
            steps = min(steps, QUICK_STEPS) if run.quick else steps
            found = compared(policy, name, steps, math.ceil(times * run.rounds))
            rows += found
            print(table(found), flush=True)
    write_csv(run.path("policy", ".csv"), rows)
    return 0


def compared(policy: Policy, name: str, steps: int, chunks: int) -> list[Row]:
    """Times chunks of all kinds in turn."""
    timed, observation = Timed(policy), torch.randn(1, OBSERVATION)
    inside: dict[str, list[float]] = {}

    def clock(candidate: Candidate, calls: int) -> float:
        timed.seconds = 0.0
        seconds = wall(candidate, calls)
        inside.setdefault(candidate.provider, []).append(timed.seconds)
        return seconds

    kinds = kinds_of(name, steps, timed)
    candidates = [Candidate(kind, partial(chunk, observation)) for kind, chunk in kinds.items()]
    # Rounds of no length: a chunk is a round.
    timings = measure(candidates, chunks, round_seconds=0, clock=clock)
    whole = {kind: timing.seconds for kind, timing in timings.items()}
    outside = {kind: seconds - np.array(inside[kind][-chunks:]) for kind, seconds in whole.items()}
    first = outside[next(iter(kinds))]
    return [_row(f"{name}, {steps} steps", kind, whole[kind], outside[kind], first) for kind in kinds]


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
