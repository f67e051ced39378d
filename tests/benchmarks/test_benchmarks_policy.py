"""benchmarks.policy: a smoke run, and that all kinds of a chunk are the same chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample
from benchmarks import policy
from benchmarks.common import cpu
from benchmarks.common.optional import optional
from benchmarks.models.action_unet import ACTIONS, HORIZON, OBSERVATION, ActionUNet
from support.levels import needs_cpu
from support.results import read

KINDS = {"DDPM": 3, "DDIM": 3, "iPNDM": 2, "LCM": 3}


@needs_cpu
def test_a_quick_run(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optional.cache_clear()
    assert policy.main(quick) == 0
    assert "of the outside of diffusers" in capsys.readouterr().out
    written = read(tmp_path / f"policy-{cpu.slug(cpu.family())}-quick.csv")
    assert [row["case"].partition(",")[0] for row in written] == [
        name for name, *_ in policy.CASES for _ in range(KINDS[name])
    ]
    for row in written:
        assert 0 < float(row["outside_p50_us"]) < 1e3 * float(row["p50_ms"]) <= 1e3 * float(row["p99_ms"])
        assert 0 < float(row["share"]) < 1


@needs_cpu
@torch.no_grad()
@pytest.mark.parametrize("steps", [5, 10, 16])
def test_kinds_compute_the_same_chunk(steps: int) -> None:
    torch.manual_seed(0)
    network, observation, x = ActionUNet((8, 16, 32)).eval(), torch.randn(1, OBSERVATION), torch.randn(policy.SHAPE)
    want = chunk(policy.scheduler_of("DDIM", steps), network, observation, x)
    drop_in = chunk(policy.scheduler_of("DDIM", steps, drop_in=True), network, observation, x)
    sampler = fastsample.from_diffusers(policy.scheduler_of("DDIM", steps))
    prepared = sampler.prepare(network, x, model_kwargs={"observation": observation})(x)
    for got in (drop_in, prepared):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def chunk(scheduler: Any, network: ActionUNet, observation: Tensor, x: Tensor) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t, observation), t, x).prev_sample
    return x


def test_the_network_is_the_published_one() -> None:
    network = ActionUNet()
    assert sum(one.numel() for one in network.parameters()) == 65_878_279
    assert network(torch.zeros(2, HORIZON, ACTIONS), torch.tensor(3), torch.zeros(2, OBSERVATION)).shape == (2, 16, 7)
