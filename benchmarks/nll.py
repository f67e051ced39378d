"""Bits per dimension of the digits: what `nll` costs beside the model's own forward passes.

Each round takes the next images of the held-out digits: all steps of the bound with `nll`, and as many forward passes
of the same batch. 50 rounds of 10 images are 500 digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

import fastsample
from benchmarks.common.harness import Candidate, measure
from benchmarks.common.options import begin, parser
from benchmarks.common.report import OURS, rows_of, table, write_csv
from fastsample.train import load_data
from fastsample.zoo import UNet

IMAGES, STEPS, ROUNDS = 10, 100, 50
QUICK_STEPS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Times both in turn and writes the results."""
    arguments = parser("benchmarks.nll", __doc__, gpus=True).parse_args(argv)
    if arguments.rounds is None and not arguments.quick:
        arguments.rounds = ROUNDS
    run = begin(arguments)
    steps = QUICK_STEPS if run.quick else STEPS
    candidates = _candidates(fastsample.zoo.digits().to(run.device), steps, run.device)
    timings = measure(candidates, run.rounds, clock=run.loop_clock)
    rows = rows_of("nll", f"{IMAGES} digits, {steps} steps", timings, {OURS: "forward"})
    print(table(rows))
    write_csv(run.path("nll", ".csv"), rows, run.device)
    return 0


def _candidates(model: UNet, steps: int, device: torch.device) -> list[Candidate]:
    data = load_data("mnist5k-held-out")
    assert data.labels is not None
    # Through the classes, which the data are sorted by.
    places = torch.arange(len(data.images)).reshape(10, -1).T.flatten()
    batches = [(data.scaled(part).to(device), data.labels[part].to(device)) for part in places.split(IMAGES)]
    ours, theirs = cycle(batches), cycle(batches)
    times = fastsample.DDPM(model.schedule, steps=steps, clip=1.0).table.times
    of_batch = [torch.full((IMAGES,), t, device=device) for t in times]

    def bound() -> Tensor:
        x0, y = next(ours)
        return fastsample.nll(model, x0, steps=steps, variance="learned_range", seed=0, model_kwargs={"y": y}).total_bpd

    @torch.no_grad()
    def forward() -> None:
        x, y = next(theirs)
        for t in of_batch:
            model(x, t, y)

    return [Candidate("forward", forward), Candidate(OURS, bound)]


if __name__ == "__main__":
    raise SystemExit(main())
