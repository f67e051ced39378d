"""Drop-in schedulers under torch.compile(fullgraph=True): one graph for all steps, with the bits of eager steps."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample.integrations.diffusers as ours

NAMES = [name for name in ours.__all__ if name.endswith("Scheduler")]


def one_step(scheduler: Any, x: Tensor, t: Any, **options: Any) -> Tensor:
    seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    out: Tensor = scheduler.step(torch.tanh(seen) * 0.5, t, x, **options).prev_sample
    return out


def options_of(name: str) -> dict[str, Any]:
    return {"seed": 3, "index": 5} if "seed" in inspect.signature(getattr(ours, name).step).parameters else {}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_steps_runs_and_numbers_of_steps_share_a_graph(compiler: Any, name: str) -> None:
    compiled = torch.compile(one_step, fullgraph=True, backend=compiler)
    own, eager = (getattr(ours, name)() for _ in range(2))
    x = y = torch.randn(2, 3, 4, 5)
    for steps in (3, 3, 2):
        for scheduler in (own, eager):
            scheduler.set_timesteps(steps)
        for t, u in zip(own.timesteps, eager.timesteps, strict=True):
            x, y = compiled(own, x, t, **options_of(name)), one_step(eager, y, u, **options_of(name))
            assert torch.equal(x, y)
    assert compiler.frame_count == 1


@torch.no_grad()
def test_timesteps_and_seeds_that_are_numbers_make_a_second_graph_at_most(compiler: Any) -> None:
    compiled = torch.compile(one_step, fullgraph=True, backend=compiler)
    scheduler = ours.DDPMScheduler()
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 4, 5)
    for t, seed in ((900, 1), (800, 2), (700, 3), (0, 2**40)):
        assert torch.equal(compiled(scheduler, x, t, seed=seed), one_step(scheduler, x, t, seed=seed))
    assert compiler.frame_count <= 2


@torch.no_grad()
def test_other_options_are_another_graph(compiler: Any) -> None:
    compiled = torch.compile(one_step, fullgraph=True, backend=compiler)
    scheduler = ours.DDIMScheduler()
    scheduler.set_timesteps(10)
    x, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for eta in (0.0, 0.5, 0.0, 0.5):
        given = {"eta": eta, "variance_noise": noise}
        assert torch.equal(compiled(scheduler, x, 500, **given), one_step(scheduler, x, 500, **given))


@torch.no_grad()
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_dtypes_are_those_of_eager_steps(compiler: Any, name: str, half: torch.dtype) -> None:
    compiled = torch.compile(one_step, fullgraph=True, backend=compiler)
    own, eager = (getattr(ours, name)() for _ in range(2))
    for scheduler in (own, eager):
        scheduler.set_timesteps(4)
    x = torch.randn(2, 3, 4, 5).to(half)
    got = compiled(own, x, own.timesteps[1], **options_of(name))
    want = one_step(eager, x, eager.timesteps[1], **options_of(name))
    assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param({"generator": torch.Generator()}, "generator", id="generator"),
        pytest.param({}, "gradients", id="gradients"),
    ],
)
def test_what_has_no_place_in_a_graph_is_named(compiler: Any, options: dict[str, Any], says: str) -> None:
    compiled = torch.compile(one_step, fullgraph=True, backend=compiler)
    scheduler = ours.DDPMScheduler()
    x = torch.randn(2, 3, requires_grad=says == "gradients")
    with pytest.raises(Exception, match=says):
        compiled(scheduler, x, 500, **options)
