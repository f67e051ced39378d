"""Guidance as an object: its methods against diffusers' guiders, whole runs, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import DDIM, Batcher, Euler, Guidance, Heun, Schedule
from fastsample.loop.guidance_methods import Bending
from support.chains import toy_model
from support.formula import normal

SCHEDULE = Schedule.scaled_linear()
SHAPE = (3, 4, 5, 7)

# Our arguments, diffusers' guider and its arguments.
METHODS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "plain": ({"method": "plain"}, "ClassifierFreeGuidance", {}),
    "plain-rescaled": ({"rescale": 0.7}, "ClassifierFreeGuidance", {"guidance_rescale": 0.7}),
    "zero-star": (
        {"method": "cfg_zero_star", "zero_init_steps": 1},
        "ClassifierFreeZeroStarGuidance",
        {"zero_init_steps": 1},
    ),
    "zero-star-at-once": (
        {"method": "cfg_zero_star", "zero_init_steps": 0},
        "ClassifierFreeZeroStarGuidance",
        {"zero_init_steps": 0},
    ),
    "zero-star-rescaled": (
        {"method": "cfg_zero_star", "zero_init_steps": 2, "rescale": 0.5},
        "ClassifierFreeZeroStarGuidance",
        {"zero_init_steps": 2, "guidance_rescale": 0.5},
    ),
    "apg": (
        {"method": "apg", "momentum": 0.0, "norm_threshold": 0.0},
        "AdaptiveProjectedGuidance",
        {"eta": 0.0, "adaptive_projected_guidance_rescale": 0.0},
    ),
    "apg-limited": (
        {"method": "apg", "momentum": 0.0, "norm_threshold": 2.5, "eta": 0.5},
        "AdaptiveProjectedGuidance",
        {"eta": 0.5, "adaptive_projected_guidance_rescale": 2.5},
    ),
    "apg-with-momentum-rescaled": (
        {"method": "apg", "momentum": -0.5, "norm_threshold": 5.0, "rescale": 0.3},
        "AdaptiveProjectedGuidance",
        {
            "eta": 0.0,
            "adaptive_projected_guidance_rescale": 5.0,
            "adaptive_projected_guidance_momentum": -0.5,
            "guidance_rescale": 0.3,
        },
    ),
}


def guider(name: str, **options: Any) -> Any:
    return getattr(pytest.importorskip("diffusers.guiders"), name)(guidance_scale=4.0, **options)


def outputs(steps: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal((2 * SHAPE[0], *SHAPE[1:]), seed, dtype) + 0.3 for seed in range(steps)]


def by_diffusers(theirs: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    found = []
    for step, output in enumerate(rows):
        theirs.set_state(step=step, num_inference_steps=len(rows), timestep=torch.tensor(0))
        theirs.prepare_inputs({"x": (output, output)})
        unconditional, conditional = output.chunk(2)
        # Rescaling the zeros of the first rows it divides by their deviation.
        found.append(theirs.forward(conditional, unconditional).pred.nan_to_num(0.0))
    return found


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("plain")])
def test_outputs_are_those_of_diffusers(backend: str, name: str) -> None:
    """Within 1e-5 of the largest value, over the rows of a run, which APG's momentum and zero rows depend on."""
    ours, theirs, options = METHODS[name]
    bending = Bending(Guidance(weight=4.0, **ours), torch.full((SHAPE[0],), 4.0), backend)
    rows = outputs(4, torch.float32)
    for _ in range(2):  # a second run begins anew
        bending.begin()
        want = by_diffusers(guider(theirs, **options), rows)
        for row, (output, one) in enumerate(zip(rows, want, strict=True)):
            assert (bending(output, SHAPE[1], row) - one).abs().max() <= 1e-5 * one.abs().max().clamp(min=1e-3)


class Told:
    """The toy model with a condition, and whatever it returned, row by row."""

    def __init__(self, learned: bool = False) -> None:
        self.outputs: list[Tensor] = []
        self._learned = learned

    def __call__(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        output = toy_model(x, t) + 0.2 * torch.cos(x * c.reshape(-1, 1, 1, 1))
        output = torch.cat([output, torch.sin(x)], dim=1) if self._learned else output
        self.outputs.append(output.clone())
        return output


KEYWORDS: dict[str, Any] = {"cond": {"c": torch.full((3,), 2.0)}, "uncond": {"c": torch.zeros(3)}}


@pytest.mark.parametrize("name", METHODS)
def test_whole_runs(backend: str, name: str) -> None:
    """The run steps by what diffusers' guider makes of the model's outputs."""
    ours, theirs, options = METHODS[name]
    model, sampler = Told(), DDIM(SCHEDULE, steps=6)
    got = sampler(model, SHAPE, seed=1, guidance=Guidance(weight=4.0, **ours), backend=backend, **KEYWORDS)
    combined = iter(by_diffusers(guider(theirs, **options), model.outputs))
    x = fastsample.ops.randn(SHAPE, seed=1)
    for k in range(6):
        x = fastsample.ops.step(x, next(combined), sampler.table, k)
    assert (got - x).abs().max() <= 2e-4 * x.abs().max()


@pytest.mark.parametrize("name", ["plain-rescaled", "zero-star-rescaled", "apg-with-momentum-rescaled"])
def test_looking_and_preparing_change_nothing(name: str) -> None:
    guidance, sampler = Guidance(weight=4.0, **METHODS[name][0]), DDIM(SCHEDULE, steps=5, clip=3.0)
    want = sampler(Told(), SHAPE, seed=1, guidance=guidance, **KEYWORDS)
    *_, last = sampler.iterate(Told(), SHAPE, seed=1, guidance=guidance, **KEYWORDS)
    assert torch.equal(last.x, want)
    prepared = sampler.prepare(Told(), SHAPE, guidance=guidance, **KEYWORDS)
    assert torch.equal(prepared(seed=1), want) and torch.equal(prepared(seed=1), want)
    x = fastsample.ops.randn(SHAPE, seed=1).requires_grad_()
    followed = sampler(Told(), x, guidance=guidance, **KEYWORDS)
    torch.testing.assert_close(followed.detach(), want, rtol=1e-4, atol=1e-4)
    followed.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_a_number_and_an_object_are_the_same_guidance() -> None:
    sampler = DDIM(SCHEDULE, steps=5)
    options: dict[str, Any] = {"guidance_rescale": 0.5, "guidance_interval": (200, 800)}
    want = sampler(Told(), SHAPE, seed=1, guidance=3.0, **options, **KEYWORDS)
    guidance = Guidance(weight=3.0, rescale=0.5, interval=(200, 800))
    assert torch.equal(sampler(Told(), SHAPE, seed=1, guidance=guidance, **KEYWORDS), want)


@pytest.mark.parametrize("method", ["cfg_zero_star", "apg"])
def test_an_interval_a_learned_variance_and_weights_of_samples(method: str) -> None:
    schedule = Schedule.linear(100)
    sampler = fastsample.DDPM(schedule, steps=8, variance="learned_range", clip=2.0)
    guidance = Guidance(weight=[1.0, 3.0, 0.0], interval=(20, 80), method=method, zero_init_steps=0)
    model = Told(learned=True)
    together = sampler(model, SHAPE, seed=1, guidance=guidance, **KEYWORDS)
    assert {len(output) for output in model.outputs} == {3, 6} and together.isfinite().all()
    for i, weight in enumerate((1.0, 3.0, 0.0)):
        alone = Guidance(weight=[weight, weight], interval=(20, 80), method=method, zero_init_steps=0)
        own = {name: {"c": value["c"][:2]} for name, value in KEYWORDS.items()}
        one = sampler(Told(learned=True), (2, *SHAPE[1:]), seed=1, index=[i, i], guidance=alone, **own)
        torch.testing.assert_close(one[0], together[i], rtol=1e-4, atol=1e-4)


def test_half_precision_outputs_are_combined_in_float32() -> None:
    bending = Bending(Guidance(weight=4.0, method="apg"), torch.full((3,), 4.0), "reference")
    output = outputs(1, torch.float16)[0]
    found = bending(output, SHAPE[1], 0)
    bending.begin()
    assert found.dtype == torch.float32 and torch.equal(found, bending(output.float(), SHAPE[1], 0))


@pytest.mark.parametrize("weight", [1.0, [1.0, 1.0, 1.0]], ids=["a number", "each"])
def test_a_weight_of_1_is_the_conditional_model(weight: Any) -> None:
    model = Told()
    guidance = Guidance(weight=weight, method="cfg_zero_star")
    got = DDIM(SCHEDULE, steps=4)(model, SHAPE, seed=1, guidance=guidance, **KEYWORDS)
    assert {len(output) for output in model.outputs} == {3}
    assert torch.equal(got, DDIM(SCHEDULE, steps=4)(Told(), SHAPE, seed=1, model_kwargs=KEYWORDS["cond"]))


def test_zero_rows_are_the_first_of_the_run_and_not_the_first_guided_ones() -> None:
    def run(zero_init_steps: int) -> Tensor:
        guidance = Guidance(weight=3.0, interval=(0, 500), method="cfg_zero_star", zero_init_steps=zero_init_steps)
        x: Tensor = DDIM(SCHEDULE, steps=6)(Told(), SHAPE, seed=1, guidance=guidance, **KEYWORDS)
        return x

    assert torch.equal(run(0), run(2)) and not torch.equal(run(0), run(5))


@pytest.mark.parametrize("method", ["cfg_zero_star", "apg"])
def test_gradients_where_both_halves_agree_and_samples_of_one_axis(method: str) -> None:
    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return toy_model(x, t) + 0.2 * c

    x = torch.linspace(-1, 1, 3).requires_grad_()
    same: dict[str, Any] = {"cond": {"c": torch.ones(3)}, "uncond": {"c": torch.ones(3)}}
    guidance = Guidance(weight=[1.0, 3.0, 0.0], method=method)
    DDIM(SCHEDULE, steps=4)(model, x, guidance=guidance, **same).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_heun_is_bent_in_both_of_its_rows() -> None:
    guidance = Guidance(weight=3.0, method="apg")
    assert Heun(SCHEDULE, steps=4)(Told(), SHAPE, seed=1, guidance=guidance, **KEYWORDS).isfinite().all()


APG, ZERO_STAR = (
    Guidance(weight=3.0, method="apg"),
    Guidance(weight=3.0, method="cfg_zero_star", zero_init_steps=2),
)
X = torch.zeros(SHAPE)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "method": (lambda: Guidance(weight=3.0, method="cfg"), "method must be one of"),
    "threshold": (lambda: Guidance(weight=3.0, norm_threshold=-1.0), "norm_threshold must not be negative"),
    "eta": (lambda: Guidance(weight=3.0, eta=float("nan")), "eta must be finite"),
    "no weight": (lambda: Guidance(weight=None), "weight must be a number"),  # type: ignore[arg-type]
    "momentum": (lambda: Guidance(weight=3.0, momentum=1.0), "momentum must lie between -1 and 1"),
    "zero rows": (lambda: Guidance(weight=3.0, zero_init_steps=-1), "zero_init_steps"),
    "rescale twice": (
        lambda: DDIM(SCHEDULE, steps=2)(Told(), SHAPE, guidance=APG, guidance_rescale=0.5, **KEYWORDS),
        "guidance_rescale beside a fastsample.Guidance",
    ),
    "interval twice": (
        lambda: DDIM(SCHEDULE, steps=2)(Told(), SHAPE, guidance=APG, guidance_interval=(0, 9), **KEYWORDS),
        "guidance_interval beside a fastsample.Guidance",
    ),
    "no uncond": (lambda: DDIM(SCHEDULE, steps=2)(Told(), SHAPE, guidance=APG), "guidance needs uncond="),
    "weight": (
        lambda: DDIM(SCHEDULE, steps=2)(Told(), SHAPE, guidance=Guidance(weight=[1.0, 2.0]), **KEYWORDS),
        "guidance.weight must be one number or 3",
    ),
    "no time": (
        lambda: DDIM(SCHEDULE, steps=2)(Told(), SHAPE, guidance=Guidance(weight=2.0, interval=(1, 2)), **KEYWORDS),
        r"guidance\.interval=\(1.0, 2.0\) holds none of the times",
    ),
    "all rows": (
        lambda: DDIM(SCHEDULE, steps=2)(Told(), SHAPE, guidance=ZERO_STAR, **KEYWORDS),
        "zero_init_steps must be less than the run's 2 rows",
    ),
    "all rows of a part": (
        lambda: DDIM(SCHEDULE, steps=4)(Told(), X, strength=0.5, guidance=ZERO_STAR, **KEYWORDS),
        "zero_init_steps must be less than the run's 2 rows",
    ),
    "all rows of a flow": (
        lambda: Euler(prediction="flow", steps=1)(Told(), SHAPE, guidance=ZERO_STAR, **KEYWORDS),
        "zero_init_steps must be less than the run's 1 rows",
    ),
    "a Batcher": (
        lambda: Batcher(Told(), DDIM(SCHEDULE, steps=2), batch=2, guidance=APG),
        "guidance",
    ),
}


# Of other methods, the argument and a value that is not the default.
OF_OTHER_METHODS = [
    *(("plain", name, value) for name, value in [("eta", 0.5), ("norm_threshold", 2.5), ("momentum", 0.0)]),
    *(("cfg_zero_star", name, value) for name, value in [("eta", 1), ("norm_threshold", 0.0), ("momentum", 0.25)]),
    *((method, "zero_init_steps", 1) for method in ("plain", "apg")),
]


@pytest.mark.parametrize(("method", "name", "value"), OF_OTHER_METHODS)
def test_arguments_of_another_method_are_refused(method: Any, name: str, value: float) -> None:
    has_it = "cfg_zero_star" if name == "zero_init_steps" else "apg"
    with pytest.raises(ValueError, match=f"^{name}={value} is for method='{has_it}', and this is method='{method}'$"):
        Guidance(weight=3.0, method=method, **{name: value})
    default = {name: getattr(Guidance, name)}
    assert getattr(Guidance(weight=3.0, method=method, **default), name) == default[name]


NAN, INF = float("nan"), float("inf")
MADE: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"weight {value!r:.20}": ({"weight": value}, "^weight must be")
        for value in ("7", True, NAN, -INF, 10**400, [1.0, NAN], [], [[1.0]], torch.ones(2, 2), {1.0}, 1j, [1, "2"])
    },
    "weight on meta": ({"weight": torch.ones(2, device="meta")}, "^weight lies on the device 'meta'"),
    "weight of bools": ({"weight": torch.ones(2, dtype=torch.bool)}, "^weight must be"),
    **{f"rescale {value!r}": ({"rescale": value}, "^rescale must") for value in (1.5, -0.1, NAN, "1", None, True)},
    **{
        f"interval {value!r}": ({"interval": value}, "^interval must be")
        for value in ((5, 4), (NAN, 4), (1, 2, 3), 500, "12", ("1", "2"), {1, 2}, (1,), (1, None))
    },
}


@pytest.mark.parametrize("name", MADE)
def test_its_own_names_are_checked_where_it_is_made(name: str) -> None:
    given, message = MADE[name]
    with pytest.raises((ValueError, TypeError), match=message):
        Guidance(**{"weight": 2.0, **given})


@pytest.mark.parametrize("weight", [3, np.float32(3), torch.tensor(3.0), [3.0] * 3, (3, 3.0, 3), torch.full((3,), 3.0)])
def test_what_a_weight_may_be(weight: Any) -> None:
    guidance = Guidance(weight=weight, rescale=0.5, interval=[0, INF])  # type: ignore[arg-type]
    want = DDIM(SCHEDULE, steps=3)(Told(), SHAPE, seed=1, guidance=3.0, guidance_rescale=0.5, **KEYWORDS)
    assert torch.equal(DDIM(SCHEDULE, steps=3)(Told(), SHAPE, seed=1, guidance=guidance, **KEYWORDS), want)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance_scale": 3.0}, "Guidance has no argument guidance_scale; did you mean weight=?"),
        ({"guidance": 3.0}, "did you mean weight=?"),
        ({"guidance_rescale": 0.5}, "did you mean rescale=?"),
        ({"guidance_interval": (0, 5)}, "did you mean interval=?"),
        ({"adaptive_projected_guidance_momentum": 0.0}, "did you mean momentum=?"),
        ({"wieght": 3.0}, "did you mean weight=?"),
        ({"weight": 3.0, "uncond": {}}, "uncond belongs to the sampler's call, not here"),
        ({"weight": 3.0, "layers": 2}, "has no argument layers: it has weight, rescale, interval, method"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_words_of_others(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        Guidance(**given)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
