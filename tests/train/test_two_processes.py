"""Two processes of torchrun are one with twice the batch: LoRAs, guided distillation, fine-tuning and autoencoders."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from support.ahead import TESTS, Ahead, in_a_process
from support.two_processes import RUNS


@Ahead
def two() -> TemporaryDirectory:
    folder = TemporaryDirectory()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    in_a_process(*launcher, "-m", "support.two_processes", folder.name, cwd=TESTS)
    return folder


@Ahead
def one() -> TemporaryDirectory:
    folder = TemporaryDirectory()
    in_a_process("-m", "support.two_processes", folder.name, cwd=TESTS)
    return folder


@pytest.mark.ahead(two)
@pytest.mark.ahead(one)
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one_with_twice_the_batch(name: str) -> None:
    pytest.importorskip("accelerate")
    histories = [
        torch.load(Path(job.result().name, name, "checkpoint.pt"), weights_only=True)["history"] for job in (two, one)
    ]
    # Gradients are summed in another order: that is float32's rounding, and Adam lets it grow with the steps.
    torch.testing.assert_close(*(history[:3] for history in histories), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*histories, rtol=1e-2, atol=1e-4)


@pytest.mark.ahead(two)
def test_every_process_has_the_autoencoder() -> None:
    pytest.importorskip("accelerate")
    first, second = (torch.load(Path(two.result().name, f"std-{rank}.pt"), weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second) and not torch.equal(first, torch.ones_like(first))
