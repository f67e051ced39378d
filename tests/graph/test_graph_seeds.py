"""Replays of a captured run follow seed and place, and draw fresh noise without one."""

from __future__ import annotations

import torch

from fastsample import graph
from support.cuda_graphs import NOISY, host
from support.pretend_device import Device
from support.whole_runs import SHAPE, model


def test_parts_of_a_set(device: Device) -> None:
    captured, want = graph(NOISY, model, SHAPE, device="cuda", seed=4, index=3), NOISY(model, (9, *SHAPE[1:]), seed=4)
    for index in (0, 7, 3):
        assert torch.equal(host(captured(index=index)), want[index : index + 2])
    assert torch.equal(host(captured()), want[3:5]), "the capture's own"
    assert torch.equal(host(captured(index=[5, 1])), want[[5, 1]])
    each = torch.cat([NOISY(model, (1, *SHAPE[1:]), seed=seed, index=6) for seed in (2**63, -1)])
    assert torch.equal(host(captured(seed=[2**63, -1], index=6)), each)
    there = torch.tensor([-(2**63), -1]).to("cuda"), torch.tensor([6, 6]).to("cuda")
    assert torch.equal(host(captured(seed=there[0], index=there[1])), each)


def test_without_a_seed_replays_differ_and_torchs_seed_repeats_them(device: Device) -> None:
    captured = graph(NOISY, model, SHAPE, device="cuda")
    torch.manual_seed(3)
    first, second = host(captured()), host(captured())
    torch.manual_seed(3)
    assert torch.equal(host(captured()), first) and torch.equal(host(captured()), second)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(NOISY(model, SHAPE), first), "as the plain call draws"
