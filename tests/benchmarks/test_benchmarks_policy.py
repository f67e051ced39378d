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

KINDS = {"DDPM": 3, "DDIM": 3, "iPNDM": 3, "LCM": 3}


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


@pytest.fixture
def network() -> ActionUNet:
    """A small one of little slope: as they are, random weights make a step's rounding a hundred times as large."""
    torch.manual_seed(0)
    network = ActionUNet((8, 16, 32)).eval().requires_grad_(False)
    for parameter in network.leave[-1].parameters():
        parameter.mul_(0.1)
    return network


@needs_cpu
@torch.no_grad()
@pytest.mark.parametrize("steps", [5, 10, 16])
@pytest.mark.parametrize("start", range(3), ids="start {}".format)
def test_kinds_compute_the_same_chunk(network: ActionUNet, steps: int, start: int) -> None:
    torch.manual_seed(start)
    observation, x = torch.randn(1, OBSERVATION), torch.randn(policy.SHAPE)
    want = chunk(policy.scheduler_of("DDIM", steps), network, observation, x)
    drop_in = chunk(policy.scheduler_of("DDIM", steps, drop_in=True), network, observation, x)
    sampler = fastsample.from_diffusers(policy.scheduler_of("DDIM", steps))
    prepared = sampler.prepare(network, x, model_kwargs={"observation": observation})(x)
    for got in (drop_in, prepared):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@needs_cpu
@torch.no_grad()
@pytest.mark.parametrize(("name", "steps"), [("DDPM", 25), ("DDIM", 16), ("DDIM", 10), ("LCM", 4)])
def test_the_timed_loops_make_the_same_chunks(network: ActionUNet, name: str, steps: int) -> None:
    kinds = policy.kinds_of(name, steps, torch.randn(1, OBSERVATION))
    theirs, drop_in = kinds["diffusers"](network), kinds["drop-in"](network)
    for _ in range(3):
        want = theirs()
        assert (drop_in() - want).abs().max() <= 1e-5 * want.abs().max()


def test_ipndm_has_no_drop_in() -> None:
    kinds = policy.kinds_of("iPNDM", 5, torch.randn(1, OBSERVATION))
    assert list(kinds) == ["diffusers", "plain torch loop", "fastsample"]


def chunk(scheduler: Any, network: ActionUNet, observation: Tensor, x: Tensor) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t, observation), t, x).prev_sample
    return x


def test_the_network_is_the_published_one() -> None:
    with torch.device("meta"):
        network = ActionUNet()
        actions = network(torch.zeros(2, HORIZON, ACTIONS), torch.tensor(3), torch.zeros(2, OBSERVATION))
    assert sum(one.numel() for one in network.parameters()) == 65_878_279
    assert actions.shape == (2, 16, 7)
