"""What a training step costs beside the network: the forward process and the loss, with their gradients.

A fused kernel for these two could save no more than the first row's share of the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.common.harness import Candidate, measure
from benchmarks.common.options import begin, parser
from benchmarks.common.report import Row, rows_of, table, write_csv
from fastsample import Schedule
from fastsample.train import DiffusionLoss
from fastsample.zoo import UNet, UNetConfig

BATCH = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Times both for every loss and writes the results."""
    run = begin(parser("benchmarks.training", __doc__).parse_args(argv))
    schedule, rows = Schedule.cosine(), list[Row]()
    x0, noise = torch.rand(2, BATCH, 1, 28, 28) * 2 - 1
    t, y = torch.randint(schedule.T, (BATCH,)), torch.arange(BATCH) % 10
    for name in ("hybrid",) if run.quick else ("simple", "vlb", "hybrid"):
        loss = DiffusionLoss(schedule, loss=name)
        model = UNet(UNetConfig(learned_variance=loss.learns_variance), schedule)
        output = torch.randn(BATCH, 1 + loss.learns_variance, 28, 28, requires_grad=True)

        def alone(loss: DiffusionLoss = loss, output: torch.Tensor = output) -> None:
            loss(output, x0, loss.q_sample(x0, t, noise), t, noise).loss.mean().backward()

        def whole(loss: DiffusionLoss = loss, model: UNet = model) -> None:
            xt = loss.q_sample(x0, t, noise)
            loss(model(xt, t, y), x0, xt, t, noise).loss.mean().backward()

        timings = measure([Candidate("forward process and loss", alone), Candidate("whole", whole)], run.rounds)
        new_rows = rows_of("training", f"{name}, batch {BATCH}", timings, {})
        print(table(new_rows), flush=True)
        rows += new_rows
    write_csv(run.path("training", ".csv"), rows, run.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
