"""Classifier-free guidance in the loop: one call for both halves, weights, intervals, rescale and keywords."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample import DDIM, DynamicThreshold, Schedule, ddim
from support.formula import UNIT
from support.guided import COND, SHAPE, UNCOND, X, model, smooth

# Three rows with values below 8, whose chain multiplies a disturbance by less than 5, rescaled or not.
SHORT = [400, 200, 50]
SMOOTH_ERROR = 3 * 16 * UNIT * 8 * 5  # a row rounds at most 16 times


def guided_by_hand(
    weights: object, interval: tuple[float, float] = (0, math.inf)
) -> Callable[[Tensor, Tensor], Tensor]:
    """The same guidance as a model of its own that calls the other twice."""
    w = torch.as_tensor(weights).reshape(-1, 1, 1, 1)

    def call(x: Tensor, t: Tensor) -> Tensor:
        conditional = model(x, t, **COND).float()
        if not interval[0] <= int(t[0]) <= interval[1]:
            return conditional
        unconditional = model(x, t, **UNCOND).float()
        return unconditional + w * (conditional - unconditional)

    return call


class Calls:
    """The model, and the sizes of the batches and the times that it was called with.

    Its keywords come in the dtype that its input was asked to have; where nobody asked, as they were given.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or torch.float32
        self.batches: list[int] = []
        self.times: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        self.batches.append(len(x))
        self.times.append(int(t[0]))
        assert (t == t[0]).all()
        if len(x) == 2 * SHAPE[0]:
            unconditional, conditional = x.chunk(2)
            assert torch.equal(unconditional, conditional), "both halves see one state"
            assert torch.equal(c, torch.cat([UNCOND["c"], COND["c"]]).to(self.dtype)), "[unconditional, conditional]"
        else:
            assert torch.equal(c, COND["c"].to(self.dtype))
        return model(x, t, c)


OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"eta": 1.0, "clip": 1.0}, id="noise-clip"),
    pytest.param({"clip": DynamicThreshold(0.9, max=3.0)}, id="threshold"),
    pytest.param({"eta": 0.5, "correct_x0": lambda x0, t: 0.9 * x0}, id="correct-x0"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weights", [3.0, -1, [1.0, 3.0, 0.0], torch.tensor([2, 1, 4])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_a_model_that_guides_itself(
    backend: str, weights: object, options: dict[str, Any], dtype: torch.dtype
) -> None:
    calls = Calls(dtype)
    common = dict(steps=5, seed=3, model_dtype=dtype, backend=backend, **options)
    got = ddim(calls, X, guidance=weights, cond=COND, uncond=UNCOND, **common)  # type: ignore[arg-type]
    assert torch.equal(got, ddim(guided_by_hand(weights), X, **common))  # type: ignore[arg-type]
    assert calls.batches == [6] * 5, "one call for both halves"
    plain = ddim(model, X, model_kwargs=COND, **common)  # type: ignore[arg-type]
    assert not torch.equal(got, plain)
    assert got.untyped_storage().nbytes() == 4 * got.numel(), "the result does not keep the buffer of both halves"


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        pytest.param((0, 999), [800, 600, 400, 200, 0], id="all"),
        pytest.param((400, 600), [600, 400], id="inclusive"),
        pytest.param((200, 200), [200], id="one-row"),
        pytest.param((-math.inf, 0), [0], id="last-row"),
        pytest.param((601, math.inf), [800], id="first-row"),
        pytest.param([200, 700], [600, 400, 200], id="list"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outside_the_interval_only_the_conditional_half_is_called(
    backend: str, interval: tuple[float, float], guided: list[int], dtype: torch.dtype
) -> None:
    calls = Calls(dtype)
    common = dict(steps=5, timesteps="leading", eta=1.0, seed=3, model_dtype=dtype, backend=backend)
    options = dict(guidance=3.0, cond=COND, uncond=UNCOND, guidance_interval=interval)
    got = ddim(calls, X, **options, **common)  # type: ignore[arg-type]
    assert calls.times == [800, 600, 400, 200, 0]
    assert calls.batches == [6 if t in guided else 3 for t in calls.times]
    assert torch.equal(got, ddim(guided_by_hand(3.0, (interval[0], interval[1])), X, **common))  # type: ignore[arg-type]
    assert got.untyped_storage().nbytes() == 4 * got.numel()


@pytest.mark.parametrize(
    "weights", [1, 1.0, [1.0, 1.0, 1.0], torch.ones(3), torch.tensor(1)], ids=["int", "float", "list", "tensor", "0-d"]
)
def test_weight_1_never_calls_the_unconditional_half(backend: str, weights: object) -> None:
    calls = Calls()
    got = ddim(calls, X, steps=4, guidance=weights, cond=COND, guidance_rescale=0.5, backend=backend)  # type: ignore[arg-type]
    assert calls.batches == [3] * 4
    assert torch.equal(got, ddim(model, X, steps=4, model_kwargs=COND, backend=backend))


def test_a_sample_of_weight_1_is_the_unguided_one(backend: str) -> None:
    got = ddim(smooth, X, steps=4, guidance=[1.0, 3.0, 1.0], cond=COND, uncond=UNCOND, backend=backend)
    plain = ddim(smooth, X, steps=4, model_kwargs=COND, backend=backend)
    assert torch.equal(got[::2], plain[::2]) and not torch.equal(got[1], plain[1])


def test_samples_do_not_depend_on_their_batch(backend: str) -> None:
    options: dict[str, Any] = dict(steps=4, eta=1.0, guidance_rescale=0.7, clip=DynamicThreshold(0.9), backend=backend)
    weights = [2.0, 3.0, 7.5]
    got = ddim(model, SHAPE, seed=20, guidance=weights, cond=COND, uncond=UNCOND, **options)
    for i in range(3):
        cond, uncond = ({"c": one["c"][i : i + 1]} for one in (COND, UNCOND))
        alone = ddim(model, (1, *SHAPE[1:]), seed=20, index=i, guidance=weights[i], cond=cond, uncond=uncond, **options)
        assert torch.equal(got[i : i + 1], alone), i


@pytest.mark.parametrize("phi", [0.3, 1.0])
@pytest.mark.parametrize("weights", [7.5, [1.0, 3.0, 7.5]], ids=["one-weight", "each"])
@pytest.mark.parametrize("clip", [None, 1.0, DynamicThreshold(0.9)], ids=["free", "clip", "threshold"])
def test_rescale_equals_rescaling_by_hand(backend: str, phi: float, weights: object, clip: object) -> None:
    w = torch.as_tensor(weights).double().reshape(-1, 1, 1, 1)

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = smooth(x, t, **COND), smooth(x, t, **UNCOND)
        m = unconditional + w * (conditional - unconditional)
        deviations = (one.std(dim=(1, 2, 3), keepdim=True) for one in (conditional, m))
        return m * (phi * next(deviations) / next(deviations) + 1 - phi)

    common: dict[str, Any] = dict(timesteps=SHORT, clip=clip)
    got = ddim(smooth, X, guidance=weights, guidance_rescale=phi, cond=COND, uncond=UNCOND, backend=backend, **common)
    want = ddim(by_hand, X.double(), model_dtype=torch.float64, **common)
    assert (got - want).abs().max() <= SMOOTH_ERROR
    unscaled = ddim(smooth, X, guidance=weights, cond=COND, uncond=UNCOND, backend=backend, **common)
    assert (got - unscaled).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interval", [None, (300, 700)], ids=["everywhere", "interval"])
def test_looking_at_a_guided_run_changes_nothing(
    backend: str, dtype: torch.dtype, interval: tuple[float, float] | None
) -> None:
    sampler = DDIM(Schedule.linear(), steps=5, eta=0.5)
    options: dict[str, Any] = dict(
        seed=0,
        guidance=[3.0, 1.0, 2.5],
        guidance_rescale=0.5,
        guidance_interval=interval,
        cond=COND,
        uncond=UNCOND,
        model_dtype=dtype,
        backend=backend,
    )
    want = sampler(smooth, X, **options)
    seen = []
    called = sampler(smooth, X, callback=lambda step: seen.append(step.x.clone()), **options)
    walked = [step.x.clone() for step in sampler.iterate(smooth, X, **options)]
    assert torch.equal(called, want)
    assert len(seen) == len(walked) == 5
    assert all(torch.equal(one, other) for one, other in zip(seen, walked, strict=True))
    assert torch.equal(walked[-1], want)


def test_a_callback_reaches_both_halves(backend: str) -> None:
    def spy(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert torch.equal(*x.chunk(2))
        assert t[0] == 750 or (x[:, 0] == 0.25).all()
        return model(x, t, c)

    def paint(step: Any) -> None:
        step.x[:, 0] = 0.25

    for dtype in (torch.float32, torch.float16):
        common = dict(steps=4, timesteps="leading", model_dtype=dtype, callback=paint, backend=backend)
        got = ddim(spy, X, guidance=2.0, cond=COND, uncond=UNCOND, **common)  # type: ignore[arg-type]
        assert (got[:, 0] == 0.25).all()


def test_a_learned_variance_is_the_conditional_one(backend: str) -> None:
    """Rows that ignore it: whatever the unconditional half says of it, the result is the same."""

    def both(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return torch.cat([model(x, t, c), torch.full_like(x, math.nan)], dim=1)

    options: dict[str, Any] = dict(steps=4, guidance=3.0, cond=COND, uncond=UNCOND, backend=backend)
    assert torch.equal(ddim(both, X, **options), ddim(model, X, **options))


def test_the_models_own_input_may_come_back(backend: str) -> None:
    """A model that returns its input returns the loop's buffer, which the step then writes."""
    for dtype in (torch.float32, torch.bfloat16):
        options: dict[str, Any] = dict(steps=4, guidance=3.0, uncond={}, model_dtype=dtype, backend=backend)
        assert torch.equal(ddim(lambda x, t: x, X, **options), ddim(lambda x, t: x.clone(), X, **options))


@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clip"])
def test_gradients_through_guidance(clip: float | None) -> None:
    options: dict[str, Any] = dict(
        timesteps=SHORT,
        guidance=[3.0, 1.0, -0.5],
        guidance_rescale=0.5,
        guidance_interval=(100, 999),
        cond=COND,
        uncond=UNCOND,
        clip=clip,
    )
    x = X.clone().requires_grad_()
    got = ddim(smooth, x, **options)
    with torch.no_grad():
        plain = ddim(smooth, x, **options)
    assert got.requires_grad and not plain.requires_grad
    assert (got - plain).abs().max() <= SMOOTH_ERROR
    double = X[..., :2, :2].double().requires_grad_()  # all samples: every weight, and deviations of 8 values
    if clip is None:
        assert torch.autograd.gradcheck(
            lambda x: ddim(smooth, x, model_dtype=torch.float64, **options), (double,), eps=1e-6, atol=1e-5
        )


# Keywords


def test_weights_are_read_once(backend: str) -> None:
    weights = torch.tensor([3.0, 2.0, 1.0])
    options: dict[str, Any] = dict(cond=COND, uncond=UNCOND, backend=backend)
    want = DDIM(Schedule.linear(), steps=4)(model, X, guidance=weights, **options)
    steps = DDIM(Schedule.linear(), steps=4).iterate(model, X, guidance=weights, **options)
    next(steps)
    weights += 100
    *_, last = steps
    assert torch.equal(last.x, want)


def test_modules_with_half_precision_parameters(backend: str) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))

        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            assert x.dtype == torch.bfloat16
            return self.gain * torch.tanh(x) + c.bfloat16()

    half = Half()

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = half(x, t, **COND).float(), half(x, t, **UNCOND).float()
        return conditional + (conditional - unconditional)  # exact: eight digits each, of much the same size

    got = ddim(half, X, steps=3, guidance=2.0, cond=COND, uncond=UNCOND, backend=backend)
    assert got.dtype == torch.float32 and not got.requires_grad
    assert torch.equal(got, ddim(by_hand, X, steps=3, model_dtype=torch.bfloat16, backend=backend))
