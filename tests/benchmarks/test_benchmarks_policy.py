"""benchmarks.policy: a smoke run, and that all kinds of a chunk are the same chunk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastsample
from benchmarks import policy
from benchmarks.cases import policy as cases
from benchmarks.common import cpu
from benchmarks.models.action_unet import ACTIONS, HORIZON, OBSERVATION, ActionUNet
from benchmarks.peers.policy import plain_ipndm, published_loop
from support.levels import needs_cpu
from support.results import read

KINDS = ("DDPM", "DDIM", "DDIM", "iPNDM", "LCM", cases.RECEDING)


@pytest.fixture(autouse=True)
def same_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@needs_cpu
def test_a_quick_run(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], has_diffusers: bool) -> None:
    assert policy.main(quick) == 0
    path = tmp_path / f"policy-{cpu.slug(cpu.family())}-quick.csv"
    assert path.exists() == has_diffusers
    if not has_diffusers:
        return
    shown = capsys.readouterr().out
    assert "of the outside of diffusers" in shown and shown.startswith(cpu.model())
    written = read(path)
    assert [row["case"].rpartition(", ")[0] for row in written] == [name for name in KINDS for _ in range(3)]
    for row in written:
        assert 0 < float(row["outside_p50_us"]) < 1e3 * float(row["p50_ms"]) <= 1e3 * float(row["p99_ms"])
        assert 0 < float(row["share"]) < 1
        assert float(row["ratio_p20"]) <= float(row["ratio_p50"]) <= float(row["ratio_p80"])
    assert {row["chunks"] for row in written if row["case"].startswith("DDPM")} == {"1"}


@needs_cpu
def test_a_chunk_asks_for_as_many_outputs_as_it_has_steps() -> None:
    for name, steps, calls in (("DDPM", 9, 9), ("DDIM", 4, 4), ("iPNDM", 5, 5), ("LCM", 3, 3), (cases.RECEDING, 10, 4)):
        network = policy.Timed(small())
        asked: list[Tensor] = []
        network.policy.register_forward_pre_hook(lambda _, given, asked=asked: asked.append(given[2]))  # type: ignore[attr-defined]
        for chunk in cases.kinds_of(name, steps, network).values():
            asked.clear()
            observation = torch.randn(1, OBSERVATION)
            chunk(observation)
            given = cases.STATES.normalised(observation) if name == cases.RECEDING else observation
            assert len(asked) == calls and all(torch.equal(one, given) for one in asked)


@needs_cpu
@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 5, 10, 16])
def test_kinds_compute_the_same_chunk(steps: int) -> None:
    network, observation, x = small(), torch.randn(1, OBSERVATION), torch.randn(cases.SHAPE)
    model = cases.given_to(network, observation)
    want = published_loop(cases.scheduler_of("DDIM", steps), steps, model, x, {})
    drop_in = published_loop(cases.scheduler_of("DDIM", steps, drop_in=True), steps, model, x, {})
    sampler = fastsample.from_diffusers(cases.scheduler_of("DDIM", steps))
    prepared = sampler.prepare(network, x, model_kwargs={"observation": observation})(x)
    for got in (drop_in, prepared):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@needs_cpu
@torch.no_grad()
@pytest.mark.parametrize(("name", "steps"), [("DDPM", 20), ("DDIM", 16), ("LCM", 4), (cases.RECEDING, 10)])
def test_the_timed_loops_make_the_same_chunks(name: str, steps: int) -> None:
    kinds, observation = cases.kinds_of(name, steps, small()), torch.randn(1, OBSERVATION)
    for _ in range(2):
        want, got = kinds[cases.PEER](observation), kinds[cases.DROP_IN](observation)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@needs_cpu
@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3, 5, 10])
def test_plain_ipndm_computes_the_same_chunk(steps: int) -> None:
    network, observation, x = small(), torch.randn(1, OBSERVATION), torch.randn(cases.SHAPE)
    sampler = cases.ipndm_of(steps)
    want = sampler(network, x, model_kwargs={"observation": observation})
    got = plain_ipndm(sampler, cases.given_to(network, observation), x)
    # Weights of up to 59 / 24 multiply the roundings of a few steps.
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@needs_cpu
@torch.no_grad()
def test_a_tick_does_half_of_a_chunk_and_begins_from_the_rest() -> None:
    chunks = [torch.randn(cases.SHAPE), torch.randn(cases.SHAPE)]
    begun: list[Tensor] = []

    def chunk(ahead: Tensor, observation: Tensor) -> Tensor:
        begun.append(ahead)
        return chunks[len(begun) - 1]

    episode = cases.Episode(chunk)
    first, second = (episode(torch.zeros(1, OBSERVATION)) for _ in chunks)
    assert first.shape == second.shape == (1, cases.DONE, ACTIONS)
    assert torch.equal(begun[1][:, : HORIZON - cases.DONE], chunks[0][:, cases.DONE :])
    assert torch.equal(begun[1][:, HORIZON - cases.DONE :], chunks[0][:, -1:].expand(-1, cases.DONE, -1))
    # A rounding of (v + 1) / 2 times a range of up to 5.
    assert (first - cases.JOINTS.largest).max() <= 1e-6 and (cases.JOINTS.least - first).max() <= 1e-6


def test_ranges_go_to_minus_one_and_one_and_back() -> None:
    for ranges in (cases.STATES, cases.JOINTS):
        values = torch.lerp(ranges.least, ranges.largest, torch.rand(5, len(ranges.least)))
        torch.testing.assert_close(ranges.normalised(ranges.least), torch.full_like(ranges.least, -1))
        torch.testing.assert_close(ranges.normalised(ranges.largest), torch.ones_like(ranges.largest))
        torch.testing.assert_close(ranges.in_units(ranges.normalised(values)), values, rtol=1e-5, atol=1e-6)


def test_the_network_is_the_published_one() -> None:
    with torch.device("meta"):
        network = ActionUNet()
        actions = network(torch.zeros(2, HORIZON, ACTIONS), torch.tensor(3), torch.zeros(2, OBSERVATION))
    assert sum(one.numel() for one in network.parameters()) == 65_878_279
    assert actions.shape == (2, HORIZON, ACTIONS)


def small() -> ActionUNet:
    """A tame one: random weights of full size make of a run's last bits up to 2e-4 of its values in 16 steps."""
    network = ActionUNet((8, 16, 32)).eval().requires_grad_(False)
    for parameter in network.leave[-1].parameters():
        parameter.mul_(0.3)
    return network
