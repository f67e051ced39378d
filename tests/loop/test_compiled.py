"""Whole runs under torch.compile, and runs of compiled models: one graph, with the bits of eager runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import Schedule

SCHEDULE = Schedule.linear(1000)
SHAPE = (2, 5, 7)
NET = torch.nn.Linear(7, 7).eval()


def model(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
    m = NET(x) + 1e-4 * t.reshape(-1, 1, 1).float()
    return m if c is None else m + c


GUIDED = {
    "guidance": 3.0,
    "cond": {"c": torch.ones(2, 1, 1)},
    "uncond": {"c": torch.zeros(2, 1, 1)},
    "guidance_rescale": 0.5,
}
RUNS = [
    pytest.param(fastsample.DDIM(SCHEDULE, steps=4), {}, id="ddim"),
    pytest.param(fastsample.DDIM(SCHEDULE, steps=4, clip=1.0), GUIDED, id="guided"),
    pytest.param(fastsample.DDPM(SCHEDULE, steps=4), {"seed": 3, "index": 5}, id="ddpm"),
    pytest.param(fastsample.UniPC(SCHEDULE, steps=5, order=3), {}, id="unipc"),
    pytest.param(fastsample.IPNDM(SCHEDULE, steps=5), {}, id="ipndm"),
    pytest.param(fastsample.Heun(SCHEDULE, steps=2), {}, id="heun"),
    pytest.param(fastsample.Euler(prediction="flow", steps=3), {"start_step": 1}, id="flow-from-row-1"),
    pytest.param(fastsample.Consistency(sigmas=(80.0, 5.0)), {"seed": 1}, id="consistency"),
]


@pytest.mark.parametrize(("sampler", "options"), RUNS)
def test_a_compiled_run_is_one_graph_with_the_bits_of_an_eager_one(
    compiler: Any, sampler: Any, options: dict[str, Any]
) -> None:
    def run(x: Tensor) -> Tensor:
        return sampler(model, x, **options)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    for seed in (0, 1):
        x = fastsample.ops.randn(SHAPE, seed=seed)
        assert torch.equal(compiled(x), run(x))
    assert compiler.frame_count == 1


def test_seeds_make_a_second_graph_at_most(compiler: Any) -> None:
    sampler = fastsample.DDIM(SCHEDULE, steps=3, eta=0.5)

    def run(seed: int) -> Tensor:
        return sampler(model, SHAPE, seed=seed)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    for seed in (7, 8, 9, 2**40):
        assert torch.equal(compiled(seed), run(seed))
    assert compiler.frame_count == 2


@pytest.mark.parametrize(("sampler", "options"), RUNS)
def test_a_compiled_model_is_compiled_once_for_all_rows_and_kinds_of_runs(
    compiler: Any, sampler: Any, options: dict[str, Any]
) -> None:
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    x = fastsample.ops.randn(SHAPE, seed=0)
    with torch.no_grad():
        for given in (x, x + 1):
            assert torch.equal(sampler(compiled, given, **options), sampler(model, given, **options))
        for step in sampler.iterate(compiled, x, **options):
            assert step.x.isfinite().all()
        sampler.prepare(compiled, x, **options)()
    assert compiler.frame_count == 1


@pytest.mark.parametrize(
    ("sampler", "options", "name"),
    [
        pytest.param(RUNS[0].values[0], {"callback": print}, "callback", id="callback"),
        pytest.param(RUNS[0].values[0], {"progress": True}, "progress", id="progress"),
        pytest.param(RUNS[0].values[0], {"strength": 0.5}, "strength", id="strength"),
        pytest.param(RUNS[3].values[0], {"start_step": 1}, "start_step", id="start_step-of-a-solver"),
        pytest.param(fastsample.DDIM(SCHEDULE, steps=2, correct_x0=lambda x0, t: x0), {}, "correct_x0", id="correct"),
        pytest.param(fastsample.DDIM(SCHEDULE, steps=2, clip=(0.0, 1.0)), {}, "clip", id="bounds"),
    ],
)
def test_what_a_graph_has_no_place_for_is_named(
    compiler: Any, sampler: Any, options: dict[str, Any], name: str
) -> None:
    compiled = torch.compile(lambda x: sampler(model, x, **options), fullgraph=True, backend=compiler)
    with pytest.raises(Exception, match=name):
        compiled(torch.ones(SHAPE))


def test_a_function_says_that_it_needs_a_sampler(compiler: Any) -> None:
    compiled = torch.compile(lambda x: fastsample.ddim(model, x, schedule=SCHEDULE), fullgraph=True, backend=compiler)
    with pytest.raises(Exception, match=r"fastsample\.DDIM"):
        compiled(torch.ones(SHAPE))


def test_gradients_are_refused(compiler: Any) -> None:
    compiled = torch.compile(lambda x: RUNS[0].values[0](model, x), fullgraph=True, backend=compiler)
    with pytest.raises(Exception, match="gradients"):
        compiled(torch.ones(SHAPE, requires_grad=True))
