"""Rows whose entries are not x0: callers are shown x0, may correct it, and paint over x as in any other run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import Step, Table, ops
from support.batcher_runs import HandMade

SHAPE = (2, 3, 6, 5)
X = ops.randn(SHAPE, seed=5)
LEVELS = {"alpha": [0.1, 0.3, 0.5, 0.7, 1.0], "sigma": [0.9, 0.7, 0.5, 0.3, 0.0]}
ROWS: dict[str, Any] = dict(p=1.25, q=-0.75, a=0.3, b=0.5, s=[0.4, 0.3, 0.0, 0.0], e=[0.5, 2.0, 1.0, 0.8], **LEVELS)
ENTRIES: dict[str, Any] = dict(hx=[1.25, 0.0, -0.5, 0.5], h0=[-1.0, 0.5, 1.0, 0.0])
LIMITS: dict[str, dict[str, Any]] = {
    "free": {},
    "clamped": {"limit": 0.6},
    "thresholded": {"limit": 2.0, "quantile": 0.9},
    "at-times": {"limit": [math.inf, 0.6, math.inf, 2.0], "quantile": [0.0, 0.0, 0.9, 0.0]},
}
RECALLS: dict[str, Any] = dict(c1=[0.0, 0.3, 0.2, 0.1], c2=[0.0, 0.0, -0.2, 0.1], c3=[0.0, 0.0, 0.0, 0.2])
MASK = torch.linspace(0, 1, 5).expand(SHAPE)
COND, UNCOND = torch.full((2, 1, 1, 1), 0.2), torch.zeros(2, 1, 1, 1)
GUIDED: dict[str, Any] = {"guidance": 3.0, "cond": {"c": COND}, "uncond": {"c": UNCOND}}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": GUIDED,
    "guided-at-times": {**GUIDED, "guidance_interval": (15, 25), "guidance_rescale": 0.7},
    "guided-each": {**GUIDED, "guidance": [1.0, 7.5]},
    "half": {"model_dtype": torch.bfloat16},
    "painted": {"mask": MASK, "known": 0.5 * X},
    "given-noise": {"noise": torch.Generator()},
}


def table(**columns: Any) -> Table:
    return Table([30, 20, 10, 0], **ROWS, **columns)


def model(x: Tensor, t: Tensor, c: Tensor | float = 0.0) -> Tensor:
    return 0.5 * torch.tanh(x) + c


def halve(x0: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x0 + 0.1


def shown(sampler: HandMade, x: Tensor, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """x and x0 as a callback sees them after every row."""
    steps: list[tuple[Tensor, Tensor]] = []

    def look(step: Step) -> None:
        steps.append((step.x.detach().clone(), step.x0.detach().clone()))

    if isinstance(options.get("noise"), torch.Generator):
        options["noise"].manual_seed(3)
    sampler(model, x, callback=look, **options)
    return steps


@pytest.mark.parametrize("correct", [None, halve], ids=["as-it-is", "corrected"])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("name", OPTIONS)
def test_entries_that_nobody_reads_change_nothing_that_is_shown(
    backend: str, name: str, limits: str, correct: Any
) -> None:
    columns, options = LIMITS[limits], {"seed": 3, "backend": backend, **OPTIONS[name]}
    got = shown(HandMade(table(**columns, **ENTRIES), correct), X, **options)
    want = shown(HandMade(table(**columns), correct), X, **options)
    for (x, x0), (same_x, same_x0) in zip(got, want, strict=True):
        if correct is None:
            assert torch.equal(x, same_x)
        # Where nothing limits x0 it is summed in another order.
        torch.testing.assert_close(x0, same_x0, rtol=0, atol=2e-6)
        torch.testing.assert_close(x, same_x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("correct", [None, halve], ids=["as-it-is", "corrected"])
def test_runs_that_gradients_follow_show_the_same(name: str, correct: Any) -> None:
    options = {"seed": 3, **OPTIONS[name]}
    for columns in LIMITS.values():
        sampler = HandMade(table(**columns, **ENTRIES, **RECALLS), correct)
        got, want = (shown(sampler, x, **options) for x in (X.clone().requires_grad_(), X))
        for pair, other in zip(got, want, strict=True):
            for one, right in zip(pair, other, strict=True):
                torch.testing.assert_close(one, right, rtol=0, atol=2e-6 if name != "half" else 2e-2)


@pytest.mark.parametrize("limits", LIMITS)
def test_painting_is_what_a_callback_paints(backend: str, limits: str) -> None:
    made = table(**LIMITS[limits], **ENTRIES, **RECALLS)
    known, rest = 0.5 * X, 1 - MASK

    def paint(step: Step) -> None:
        z = ops.randn(SHAPE, seed=3, step=step.index, stream=2)
        step.x.mul_(MASK).add_(rest * known, alpha=step.alpha)
        if step.sigma > 0:
            step.x.addcmul_(rest, z, value=step.sigma)

    painted = HandMade(made)(model, X, seed=3, mask=MASK, known=known, backend=backend)
    assert torch.equal(painted, HandMade(made)(model, X, seed=3, callback=paint, backend=backend))


def test_a_corrected_nan_leaves_no_trace(backend: str) -> None:
    """x0 is all that reads the model here; entries are made of what it is corrected to."""

    def broken(x: Tensor, t: Tensor) -> Tensor:
        m = model(x, t)
        m[0, 0, 0, :2] = math.nan
        return m

    sampler = HandMade(table(**ENTRIES, **RECALLS, limit=0.6), lambda x0, t: x0.nan_to_num(0.25))
    steps = list(sampler.iterate(broken, X, seed=3, backend=backend))
    assert len(steps) == 4 and steps[-1].x.isfinite().all() and steps[-1].x0[0, 0, 0, 0] == 0.25


def test_what_a_callback_makes_of_the_x0_it_is_shown_is_not_remembered(backend: str) -> None:
    sampler = HandMade(table(**ENTRIES, **RECALLS))
    want = sampler(model, X, seed=3, backend=backend)
    assert torch.equal(sampler(model, X, seed=3, backend=backend, callback=lambda step: step.x0.zero_()), want)


def test_x0_may_not_be_replaced_by_another_tensor(backend: str) -> None:
    def replace(step: Step) -> None:
        step.x0.data = step.x0.data.clone()

    with pytest.raises(ValueError, match=r"step.x0 was replaced or resized"):
        HandMade(table(**ENTRIES))(model, X, seed=3, backend=backend, callback=replace)
