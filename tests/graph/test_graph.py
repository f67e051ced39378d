"""fastsample.graph: replays give what the plain call gives, for other seeds, starts and conditions.

Without a GPU the pretended device tapes what a capture launches, and a replay runs the tape: none of the loop's Python.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import LCM, DPMSolver, Graph, Shared, graph
from fastsample.loop import workspace
from support.cuda_graphs import NOISY, cuda_graphs, host
from support.pretend_device import Device
from support.whole_runs import COND, PAINTED, RUNS, SCHEDULE, SHAPE, UNCOND, X, model, moved

OTHER = X.flip(0).mul(0.7).contiguous()


# The reference draws its noise in hundreds of operations, which a tape is slow to run.
REFERENCE = ("ddim-threshold", "guided-rescaled", "dpm-solver-3-guided")


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        *(pytest.param(name, True, id=f"{name}-kernels") for name in RUNS),
        *(pytest.param(name, False, id=f"{name}-reference") for name in REFERENCE),
    ],
)
def test_replays_have_the_bits_of_the_plain_call(monkeypatch: pytest.MonkeyPatch, name: str, kernels: bool) -> None:
    make, options, inner, x = RUNS[name]
    sampler, backend, calls = make(), "cpu" if kernels else "reference", 0

    def counted(*arguments: Any, **keywords: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return inner(*arguments, **keywords)

    seeds = [[3, 2**63], 11, [3, 2**63]]
    want = [sampler(inner, x, backend=backend, **{**options, "seed": seed}) for seed in seeds]
    as_captured = sampler(inner, x, backend=backend, **options)
    from_other = sampler(inner, OTHER, backend=backend, **{**options, "seed": 11})
    with cuda_graphs(monkeypatch, kernels):
        captured = graph(sampler, counted, moved(x, "cuda"), device="cuda", **moved(options, "cuda"))
        at_capture = calls
        got = [captured(seed=seed) for seed in seeds]
        again, other = captured(), captured(moved(OTHER, "cuda"), seed=11)
        assert all(torch.equal(host(one), expected) for one, expected in zip(got, want, strict=True))
        assert torch.equal(host(again), as_captured)
        assert torch.equal(host(other), from_other)
    assert calls == at_capture, "a replay runs no Python"


def test_a_start_from_the_cpu(device: Device) -> None:
    captured = graph(NOISY, model, SHAPE, device="cuda")
    assert torch.equal(host(captured(X, seed=4)), NOISY(model, X, seed=4))
    half = X.to(torch.float16)
    assert torch.equal(host(captured(half, seed=4)), NOISY(model, half, seed=4))


def nested(x: Tensor, t: Tensor, parts: dict[str, Any], scale: float) -> Tensor:
    return model(x, t, parts["pair"][0]) + scale * parts["c"] * x


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
def test_conditions_are_replaced(device: Device, guided: bool) -> None:
    def keywords(a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"parts": {"pair": (a, 1.0), "c": b}, "scale": 0.5}

    first, second = keywords(COND, UNCOND + 0.1), keywords(COND * -0.3, COND * 0.7)
    third = keywords(UNCOND - 0.2, COND)
    also: dict[str, Any] = {"guidance": 2.0, "uncond": first, "guidance_interval": (300, 1000)} if guided else {}
    captured = graph(NOISY, nested, SHAPE, device="cuda", cond=moved(first, "cuda"), **moved(also, "cuda"))
    assert torch.equal(host(captured(seed=1)), NOISY(nested, SHAPE, seed=1, cond=first, **also))
    captured.update(cond=moved(second, "cuda"))
    assert torch.equal(host(captured(seed=1)), NOISY(nested, SHAPE, seed=1, cond=second, **also))
    if guided:
        captured.update(uncond=moved(third, "cuda"), guidance=[4.0, -1.0])
        also = {**also, "uncond": third, "guidance": [4.0, -1.0]}
        assert torch.equal(host(captured(seed=1)), NOISY(nested, SHAPE, seed=1, cond=second, **also))
    captured.update(cond=moved(first, "cuda"))
    assert torch.equal(host(captured(seed=2)), NOISY(nested, SHAPE, seed=2, cond=first, **also))


def test_model_kwargs_are_replaced(device: Device) -> None:
    captured = graph(NOISY, model, SHAPE, device="cuda", model_kwargs={"c": COND.to("cuda")})
    captured.update(model_kwargs={"c": (COND * 2).to("cuda")})
    assert torch.equal(host(captured(seed=0)), NOISY(model, SHAPE, seed=0, model_kwargs={"c": COND * 2}))


def test_shared_values_are_replaced(device: Device) -> None:
    def looked_up(x: Tensor, t: Tensor, c: Tensor, table: Tensor) -> Tensor:
        assert table.shape == (3,)
        return model(x, t, c) + 0.1 * table[1] * x

    def keywords(a: Tensor, table: Tensor) -> dict[str, Any]:
        return {"c": a.to("cuda"), "table": Shared(table.to("cuda"))}

    def on_cpu(a: Tensor, table: Tensor) -> dict[str, Any]:
        return {"c": a, "table": Shared(table)}

    first, second = torch.arange(3.0), torch.arange(3.0) * -2
    options: dict[str, Any] = {"guidance": 2.0}
    captured = graph(
        NOISY, looked_up, SHAPE, device="cuda", cond=keywords(COND, first), uncond=keywords(UNCOND, first), **options
    )
    want = NOISY(looked_up, SHAPE, seed=1, cond=on_cpu(COND, first), uncond=on_cpu(UNCOND, first), **options)
    assert torch.equal(host(captured(seed=1)), want)
    captured.update(cond=keywords(COND, second), uncond=keywords(UNCOND, second))
    want = NOISY(looked_up, SHAPE, seed=1, cond=on_cpu(COND, second), uncond=on_cpu(UNCOND, second), **options)
    assert torch.equal(host(captured(seed=1)), want)


def test_keywords_of_another_dtype_are_replaced(device: Device) -> None:
    options: dict[str, Any] = {"device": "cuda", "model_dtype": torch.float16}
    captured = graph(NOISY, model, SHAPE, model_kwargs={"c": COND.to("cuda")}, **options)
    captured.update(model_kwargs={"c": (COND * 2).to("cuda")})
    want = NOISY(model, SHAPE, seed=3, model_kwargs={"c": COND * 2}, model_dtype=torch.float16)
    assert torch.equal(host(captured(seed=3)), want)


def test_what_is_known_is_replaced(device: Device) -> None:
    captured = graph(NOISY, model, SHAPE, device="cuda", **PAINTED)
    mask = 1 - PAINTED["mask"]
    captured.update(mask=mask)
    assert torch.equal(host(captured(seed=2)), NOISY(model, SHAPE, seed=2, mask=mask, known=X))
    captured.update(known=OTHER)
    assert torch.equal(host(captured(seed=2)), NOISY(model, SHAPE, seed=2, mask=mask, known=OTHER))


def test_the_callers_tensors_are_neither_written_nor_watched(device: Device) -> None:
    cond, uncond, x, weights = COND.to("cuda"), UNCOND.to("cuda"), X.to("cuda"), torch.tensor([2.0, 3.0]).to("cuda")
    given: dict[str, Any] = {"guidance": weights, "cond": {"c": cond}, "uncond": {"c": uncond}}
    interval = {"guidance_interval": (300, 1000)}
    captured = graph(NOISY, model, x, **given, **interval)
    replaced = (cond * 3).clone()
    captured.update(cond={"c": replaced})
    captured()
    assert torch.equal(host(cond), COND) and torch.equal(host(uncond), UNCOND) and torch.equal(host(x), X)
    for tensor in (cond, uncond, x, weights, replaced):
        tensor.fill_(50)
    want = NOISY(
        model, X, seed=0, guidance=[2.0, 3.0], cond={"c": COND * 3}, uncond={"c": UNCOND}, guidance_interval=(300, 1000)
    )
    assert torch.equal(host(captured(seed=0)), want)


def test_results_own_their_memory(device: Device) -> None:
    with torch.inference_mode():
        captured = graph(NOISY, model, SHAPE, device="cuda")
        first = captured(seed=1)
    assert not first.is_inference() and not first.requires_grad
    out = torch.zeros(SHAPE, device="cuda")
    assert captured(seed=2, out=out) is out
    assert torch.equal(host(first), NOISY(model, SHAPE, seed=1))
    assert torch.equal(host(out), NOISY(model, SHAPE, seed=2))


def test_weights_changed_in_place_count(device: Device) -> None:
    weight = torch.full((1, 3, 1, 1), 0.5).to("cuda")
    captured = graph(NOISY, lambda x, t: weight * x, SHAPE, device="cuda")
    weight.fill_(0.25)
    want = NOISY(lambda x, t: torch.full((1, 3, 1, 1), 0.25) * x, SHAPE, seed=9)
    assert torch.equal(host(captured(seed=9)), want)


def test_a_model_that_is_told_its_guidance(device: Device) -> None:
    class Told:
        config = SimpleNamespace(time_cond_proj_dim=8)

        def __call__(self, x: Tensor, t: Tensor, timestep_cond: Tensor) -> Tensor:
            return 0.3 * x + timestep_cond[:, :1, None, None]

    sampler = LCM(SCHEDULE, steps=2)
    captured = graph(sampler, Told(), SHAPE, device="cuda", guidance_embedding=4.0)  # type: ignore[call-arg]
    assert torch.equal(host(captured(seed=5)), sampler(Told(), SHAPE, seed=5, guidance_embedding=4.0))


def test_a_rerun_starts_from_the_same_turn(device: Device) -> None:
    """An odd number of rows, and two histories that plans take turns to write."""
    sampler = DPMSolver(SCHEDULE, steps=5, order=3)
    captured = graph(sampler, model, SHAPE, device="cuda")
    want = sampler(model, SHAPE, seed=3)
    assert [torch.equal(host(captured(seed=3)), want) for _ in range(3)] == [True] * 3


def test_options_that_are_not_in_force_are_none(device: Device) -> None:
    captured = graph(NOISY, model, SHAPE, device="cuda", callback=None, progress=False, noise=None, out=None, cond=None)
    assert isinstance(captured, Graph)
    assert torch.equal(host(captured(seed=1)), NOISY(model, SHAPE, seed=1))


def test_the_loops_buffers_are_made_on_the_callers_stream(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Memory of the warm-up's stream could go to others while a replay on the caller's uses it."""
    order: list[str] = []
    make_plans = workspace.plans_in_turn

    def plans(*args: Any, **options: Any) -> Any:
        order.append("buffers")
        return make_plans(*args, **options)

    def stream(one: object) -> Any:
        order.append("side stream")
        return nullcontext()

    monkeypatch.setattr(workspace, "plans_in_turn", plans)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    graph(NOISY, model, SHAPE, device="cuda")
    assert order == ["buffers", "side stream"]


def test_a_replay_over_freed_memory_is_found(device: Device) -> None:
    """The tests above would pass on a tape that kept whatever it was shown."""
    kept = [COND.to("cuda")]
    captured = graph(NOISY, lambda x, t: model(x, t, kept[0]), SHAPE, device="cuda")
    captured()
    kept.clear()
    with pytest.raises(AssertionError, match="freed since"):
        captured()


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_on_a_gpu_replays_have_the_bits_of_the_plain_call(name: str) -> None:
    make, options, inner, x = RUNS[name]
    sampler, start, given = make(), moved(x, "cuda"), moved(options, "cuda")
    captured = graph(sampler, inner, start, device="cuda", **given)
    for seed in (3, 11, 3):
        assert torch.equal(captured(seed=seed), sampler(inner, start, device="cuda", **{**given, "seed": seed}))
