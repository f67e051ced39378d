"""examples/policy.py: the chunks are those of diffusers' loop, and stay in the joints' ranges."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from support.paths import ROOT


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        names = runpy.run_path(str(ROOT / "examples" / "policy.py"), run_name="__main__")
    assert not any(tmp_path.iterdir())
    return names


def test_the_first_chunk_is_diffusers(shown: dict[str, Any]) -> None:
    theirs = diffusers.DDIMScheduler.from_config(shown["scheduler"].config)
    theirs.set_timesteps(10)
    x = shown["start"]
    for t in theirs.timesteps:
        x = theirs.step(shown["policy"](x, t, **shown["seen"]), t, x).prev_sample
    # Ten steps of a few roundings each, of values up to 1.
    torch.testing.assert_close(shown["prepared"], x, rtol=0, atol=1e-5)


def test_actions_are_in_the_joints_ranges(shown: dict[str, Any]) -> None:
    robot, least, largest = shown["robot"], shown["least"], shown["largest"]
    assert ((least <= robot) & (robot <= largest)).all()
    assert (robot.amax((0, 1)) - robot.amin((0, 1)) > 0.1 * (largest - least)).all()


def test_what_is_left_of_a_chunk_is_normalised_as_its_joints_are(shown: dict[str, Any]) -> None:
    ahead, robot, done = shown["ahead"], shown["robot"], shown["DONE"]
    least, largest = shown["least"], shown["largest"]
    assert (ahead.abs() <= 1 + 1e-6).all()
    again = (ahead + 1) / 2 * (largest - least) + least
    torch.testing.assert_close(again[:, :-done], robot[:, done:], rtol=0, atol=1e-5)


def test_a_warm_start_stays_near_what_was_left_of_the_last_chunk(shown: dict[str, Any]) -> None:
    ahead, chunk, start = shown["ahead"], shown["chunk"], shown["start"]
    assert (chunk - ahead).norm() < (start - ahead).norm()


def test_a_warm_start_makes_four_of_ten_calls(shown: dict[str, Any]) -> None:
    calls: list[int] = []
    shown["policy"].register_forward_hook(lambda *_: calls.append(1))
    shown["act"](shown["ahead"], seed=0)
    assert len(calls) == 4
