"""Classifier-free guidance in the loop: one call for both halves, weights, intervals, rescale and keywords."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastsample import DDIM, DynamicThreshold, Schedule, Shared, ddim, ops
from support.formula import UNIT

SHAPE = (3, 2, 5, 4)
COND = {"c": torch.tensor([0.4, -0.3, 0.2]).reshape(3, 1, 1, 1)}
UNCOND = {"c": torch.zeros(3, 1, 1, 1)}
X = ops.randn(SHAPE, seed=5)
# Three rows with values below 8, whose chain multiplies a disturbance by less than 5, rescaled or not.
SHORT = [400, 200, 50]
SMOOTH_ERROR = 3 * 16 * UNIT * 8 * 5  # a row rounds at most 16 times


def smooth(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    assert len(x) == len(t) == len(c)
    return 0.5 * torch.tanh(x) + c.to(x.dtype) * torch.cos(x)


def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Outputs in 64ths below 1, which half precision holds exactly: small whole weights guide them without rounding."""
    return (64 * smooth(x, t, c)).round() / 64


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_outside_the_interval_only_the_conditional_half_is_called(
    backend: str, interval: tuple[float, float], guided: list[int], dtype: torch.dtype
) -> None:
    calls = Calls(dtype)
    common = dict(steps=5, eta=1.0, seed=3, model_dtype=dtype, backend=backend)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
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
        got = ddim(
            spy, X, steps=4, guidance=2.0, cond=COND, uncond=UNCOND, model_dtype=dtype, callback=paint, backend=backend
        )
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


def test_keywords_are_batched_by_their_kind() -> None:
    seen: list[dict[str, Any]] = []

    def spy(x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        seen.append(keywords)
        return 0.5 * x

    shared, marker, words = torch.arange(7.0), object(), ["a", "b", "c"]
    ddim(
        spy,
        X,
        steps=2,
        guidance=2.0,
        guidance_interval=(400, 999),
        model_kwargs={
            "mask": torch.ones(3, 4),
            "scale": 2.0,
            "table": Shared(shared),
            "marker": marker,
            "text": torch.zeros(3, 5),
        },
        cond={
            "text": torch.ones(3, 5),
            "more": {"pooled": torch.full((3, 2), 7.0), "size": (64, 64), "n": {"k": None}},
            "residuals": (torch.ones(3, 1), (torch.full((3, 1), 2.0), "a")),
            "words": words,
            "level": torch.tensor(0.5),
            "array": np.arange(3),
        },
        uncond={
            "more": {"pooled": torch.zeros(3, 2), "size": (64, 64), "n": {"k": None}},
            "residuals": (torch.zeros(3, 1), (torch.zeros(3, 1), "a")),
            "words": ["", "", ""],
            "level": torch.tensor(0.5),
            "array": np.arange(3),
        },
    )
    both, conditional = seen
    assert torch.equal(both["text"], torch.cat([torch.zeros(3, 5), torch.ones(3, 5)])), "uncond keeps model_kwargs' own"
    assert torch.equal(both["mask"], torch.ones(6, 4)), "what model_kwargs give is batched for both"
    assert torch.equal(both["more"]["pooled"], torch.tensor([0.0] * 3 + [7.0] * 3)[:, None].expand(6, 2))
    assert both["scale"] == 2.0 and both["marker"] is marker and both["table"] is shared
    assert both["words"] == ["", "", "", *words] and both["level"] == 0.5
    first, (second, text) = both["residuals"]
    assert first.flatten().tolist() == [0, 0, 0, 1, 1, 1] and second.flatten().tolist() == [0, 0, 0, 2, 2, 2]
    assert text == "a" and type(both["residuals"]) is tuple and both["array"].tolist() == [0, 1, 2]
    assert both["more"]["size"] == (64, 64) and both["more"]["n"] == {"k": None}
    assert torch.equal(conditional["text"], torch.ones(3, 5)) and torch.equal(conditional["mask"], torch.ones(3, 4))
    assert torch.equal(conditional["more"]["pooled"], torch.full((3, 2), 7.0)) and conditional["marker"] is marker
    assert conditional["words"] is words and conditional["table"] is shared


def test_the_callers_keywords_are_left_alone() -> None:
    cond, uncond, common = {"c": COND["c"].clone()}, {"c": UNCOND["c"].clone()}, {"scale": 1.0}
    ddim(lambda x, t, c, scale: model(x, t, c), X, steps=2, guidance=2.0, cond=cond, uncond=uncond, model_kwargs=common)
    assert list(cond) == list(uncond) == ["c"] and common == {"scale": 1.0}
    assert torch.equal(cond["c"], COND["c"]) and torch.equal(uncond["c"], UNCOND["c"])


C, U = COND["c"], UNCOND["c"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"uncond": None}, ValueError, "guidance needs uncond=", id="no-uncond"),
        pytest.param({"uncond": {}}, ValueError, "only one of them has c", id="keyword-missing"),
        pytest.param({"cond": {**COND, "z": 1, "y": 2}}, ValueError, "only one of them has y, z", id="keywords-extra"),
        pytest.param(
            {"cond": {"c": {"k": C}}, "uncond": {"c": {"l": U}}}, ValueError, r"has c\.k, c\.l", id="nested-keywords"
        ),
        pytest.param({"cond": {"c": C[:, 0]}}, ValueError, "c must have one shape in cond and uncond", id="shapes"),
        pytest.param({"cond": {"c": C[:2]}, "uncond": {"c": U[:2]}}, ValueError, r"c is a tensor.*Shared", id="batch"),
        pytest.param({"cond": {"c": C[:2]}}, ValueError, r"c is a tensor.*: 3 in", id="one-wrong-batch"),
        pytest.param({"cond": {"c": torch.tensor(1.0)}}, ValueError, r"c is a tensor.*\(\) and", id="0-d-and-batch"),
        pytest.param(
            {"cond": {"c": torch.tensor(1.0)}, "uncond": {"c": torch.tensor(2.0)}},
            ValueError,
            "c differs between",
            id="0-d",
        ),
        pytest.param(
            {"model_kwargs": {"k": torch.arange(7.0)}}, ValueError, r"k is a tensor.*Shared", id="of-no-sample"
        ),
        pytest.param({"model_kwargs": {"k": torch.ones(1, 3)}}, ValueError, r"k is a tensor.*Shared", id="batch-of-1"),
        pytest.param(
            {"cond": {"c": Shared(C)}, "uncond": {"c": Shared(U)}}, ValueError, "c differs between", id="two-shared"
        ),
        pytest.param({"cond": {"c": Shared(C)}}, ValueError, "c differs between", id="shared-in-one"),
        pytest.param({"cond": {"c": 2.0}, "uncond": {"c": 3.0}}, ValueError, "c differs between", id="numbers"),
        pytest.param({"cond": {"c": 2}, "uncond": {"c": 2.0}}, ValueError, "c differs between", id="types"),
        pytest.param({"cond": {"c": C}, "uncond": {"c": None}}, ValueError, "c differs between", id="none"),
        pytest.param(
            {"cond": {"c": {"k": "a"}}, "uncond": {"c": {"k": "b"}}}, ValueError, r"c\.k differs", id="nested"
        ),
        pytest.param({"cond": {"c": (C, 1)}, "uncond": {"c": (U, 2)}}, ValueError, r"c\[1\] differs", id="in-a-tuple"),
        pytest.param(
            {"cond": {"c": (C,)}, "uncond": {"c": (U, U)}}, ValueError, "c differs", id="tuples-of-two-lengths"
        ),
        pytest.param(
            {"cond": {"c": [C]}, "uncond": {"c": [U, U]}}, ValueError, "c is a list.*tuple", id="list-lengths"
        ),
        pytest.param({"model_kwargs": {"k": [1, 2]}}, ValueError, "k is a list.*: 3 in cond", id="list-of-2"),
        pytest.param({"cond": {"c": np.ones(2)}, "uncond": {"c": np.zeros(2)}}, ValueError, "c differs", id="arrays"),
        pytest.param({"cond": {"c": {"k": C}}}, ValueError, "c differs between", id="mapping-and-tensor"),
        pytest.param({"cond": [C]}, TypeError, "cond must be a mapping", id="cond-list"),
        pytest.param({"uncond": "none"}, TypeError, "uncond must be a mapping", id="uncond-text"),
        pytest.param({"model_kwargs": 1}, TypeError, "model_kwargs must be a mapping", id="kwargs-number"),
        pytest.param({"guidance": math.nan}, ValueError, "guidance must be finite", id="weight-nan"),
        pytest.param({"guidance": [1.0, 2.0]}, ValueError, "guidance must be one number or 3", id="weights-too-few"),
        pytest.param({"guidance": torch.ones(3, 1)}, ValueError, "guidance must be one number or 3", id="weights-2d"),
        pytest.param({"guidance_rescale": 1.5}, ValueError, "guidance_rescale must lie in", id="phi"),
        pytest.param({"guidance_rescale": math.nan}, ValueError, "guidance_rescale must lie in", id="phi-nan"),
        pytest.param({"guidance": "much"}, TypeError, "guidance must be a number or one per sample", id="weight-text"),
        pytest.param({"guidance": None}, ValueError, "uncond without guidance=", id="weight-missing"),
        pytest.param(
            {"guidance": None, "uncond": None, "guidance_interval": (1, 5), "guidance_rescale": 0.5},
            ValueError,
            "guidance_interval and guidance_rescale without guidance=",
            id="options-without-a-weight",
        ),
        pytest.param({"guidance_interval": (1, 2, 3)}, TypeError, r"must be \(t_lo, t_hi\)", id="interval-of-three"),
        pytest.param({"guidance_interval": 500}, TypeError, r"must be \(t_lo, t_hi\)", id="interval-number"),
        pytest.param({"guidance_interval": (400.5, 599)}, ValueError, "holds none of the times", id="interval-empty"),
        pytest.param({"guidance_interval": (5, 4)}, ValueError, "t_lo <= t_hi", id="interval-backwards"),
        pytest.param({"guidance_interval": (math.nan, 4)}, ValueError, "t_lo <= t_hi", id="interval-nan"),
    ],
)
def test_refused_before_the_model_is_called(options: dict[str, Any], error: type[Exception], message: str) -> None:
    def never(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("called")

    given: dict[str, Any] = {"guidance": 2.0, "cond": COND, "uncond": UNCOND, **options}
    with pytest.raises(error, match=message):
        ddim(never, X, steps=3, **given)
    with pytest.raises(error, match=message):
        DDIM(Schedule.linear(), steps=3).iterate(never, X, **given)


def test_without_a_weight_only_cond_counts(backend: str) -> None:
    got = ddim(model, X, steps=4, cond=COND, model_kwargs=UNCOND, backend=backend)
    assert torch.equal(got, ddim(model, X, steps=4, model_kwargs=COND, backend=backend)), "cond goes over model_kwargs"


def test_weights_are_read_once(backend: str) -> None:
    weights = torch.tensor([3.0, 2.0, 1.0])
    options: dict[str, Any] = dict(cond=COND, uncond=UNCOND, backend=backend)
    want = DDIM(Schedule.linear(), steps=4)(model, X, guidance=weights, **options)
    steps = DDIM(Schedule.linear(), steps=4).iterate(model, X, guidance=weights, **options)
    next(steps)
    weights += 100
    *_, last = steps
    assert torch.equal(last.x, want)


@pytest.mark.parametrize("rows", [2, 5, 7], ids=lambda rows: f"{rows}B")
def test_an_output_of_another_batch_is_refused(backend: str, rows: int) -> None:
    with pytest.raises(ValueError, match="with twice the batch under guidance"):
        ddim(lambda x, t: torch.zeros(rows, *SHAPE[1:]), X, steps=2, guidance=2.0, uncond={}, backend=backend)


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
