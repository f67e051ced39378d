"""The one loop: models, states, callbacks, iterators, gradients, memory and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample import DDIM, Schedule, Step, ddim, ops

SHAPE = (2, 3, 6, 5)


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * 0.5


def sampler(**arguments: object) -> DDIM:
    return DDIM(Schedule.linear(), steps=6, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda m: m, id="tensor"),
        pytest.param(lambda m: (m, "more"), id="tuple"),
        pytest.param(lambda m: [m], id="list"),
        pytest.param(lambda m: SimpleNamespace(sample=m), id="sample"),
        pytest.param(lambda m: torch.cat([m, m * float("nan")], dim=1), id="2C"),
        pytest.param(lambda m: m.to(memory_format=torch.channels_last), id="channels-last"),
        pytest.param(lambda m: m.transpose(2, 3).contiguous().transpose(2, 3), id="strided"),
        pytest.param(lambda m: m.double(), id="float64"),
    ],
)
def test_what_a_model_may_return(backend: str, wrap: object) -> None:
    want = ddim(model, SHAPE, seed=0, steps=4, backend=backend)
    got = ddim(lambda x, t: wrap(model(x, t)), SHAPE, seed=0, steps=4, backend=backend)  # type: ignore[operator]
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        pytest.param(None, TypeError, "NoneType", id="none"),
        pytest.param((), TypeError, "tuple", id="empty-tuple"),
        pytest.param({"sample": 1}, TypeError, "dict", id="dict"),
        pytest.param(torch.zeros(2, 4, 6, 5), ValueError, "twice its axis 1", id="wrong-channels"),
        pytest.param(torch.zeros(1, 3, 6, 5), ValueError, "model_output", id="would-broadcast"),
        pytest.param(torch.zeros(SHAPE, dtype=torch.int64), TypeError, "floating point", id="integers"),
        pytest.param(torch.zeros(SHAPE, device="meta"), ValueError, "meta", id="other-device"),
    ],
)
def test_what_a_model_may_not_return(backend: str, output: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ddim(lambda x, t: output, SHAPE, steps=2, backend=backend)
    x = torch.zeros(SHAPE, requires_grad=True)
    with pytest.raises(error, match=message):
        ddim(lambda x, t: output, x, steps=2)


def test_the_model_sees_times_dtype_and_keywords() -> None:
    seen = []

    def spy(x: Tensor, t: Tensor, y: str) -> Tensor:
        seen.append((t.dtype, tuple(t.shape), t.tolist(), x.dtype, y))
        return model(x, t)

    ddim(spy, SHAPE, timesteps=[900, 500, 10], model_kwargs={"y": "cat"})
    assert seen == [(torch.int64, (2,), [t, t], torch.float32, "cat") for t in (900, 500, 10)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_model_dtype_is_asked_for_or_that_of_the_parameters(backend: str, dtype: torch.dtype) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.index = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
            self.weight = nn.Parameter(torch.full((), 0.5, dtype=dtype))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == dtype
            return x * self.weight

    def function(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == dtype
        return x * 0.5

    by_parameter = ddim(Half(), SHAPE, seed=0, steps=5, eta=0.5, backend=backend)
    asked = ddim(function, SHAPE, seed=0, steps=5, eta=0.5, model_dtype=dtype, backend=backend)
    assert torch.equal(by_parameter, asked) and asked.dtype == torch.float32
    walked = DDIM(Schedule.linear(), steps=5, eta=0.5).iterate(Half(), SHAPE, seed=0, backend=backend)
    *_, last = sampler_steps = list(walked)
    assert torch.equal(last.x, asked) and len(sampler_steps) == 5, "the input made in the pass and after it must agree"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_x_is_never_modified_and_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    x = ops.randn(SHAPE, seed=5).to(dtype)
    before = x.clone()
    got = ddim(model, x, steps=4, backend=backend)
    assert torch.equal(x, before) and got.dtype == torch.float32
    assert torch.equal(got, ddim(model, x.float(), steps=4, backend=backend))


def test_strided_x() -> None:
    x = ops.randn(SHAPE, seed=5)
    strided = x.to(memory_format=torch.channels_last)
    got = ddim(model, strided, steps=4)
    assert torch.equal(got, ddim(model, x, steps=4)) and got.is_contiguous()


def test_float64_runs_on_the_reference() -> None:
    x = ops.randn(SHAPE, seed=5).double()
    got = ddim(model, x, seed=0, steps=4, eta=0.5, model_dtype=torch.float64)
    assert got.dtype == torch.float64
    assert (got - ddim(model, x.float(), seed=0, steps=4, eta=0.5)).abs().max() < 1e-6 * got.abs().max()
    with pytest.raises(ValueError, match=r"reference|cannot run"):
        ddim(model, x, steps=4, backend="cpu")


@pytest.mark.parametrize(
    ("x", "error"),
    [
        pytest.param(torch.zeros(SHAPE, dtype=torch.int64), TypeError, id="integers"),
        pytest.param(torch.zeros(SHAPE, dtype=torch.complex64), TypeError, id="complex"),
        pytest.param(torch.zeros(0, 3), ValueError, id="no-samples"),
        pytest.param((2, 0), ValueError, id="zero-shape"),
        pytest.param((), ValueError, id="no-axis"),
        pytest.param("no shape", TypeError, id="string"),
        pytest.param(16, TypeError, id="number"),
        pytest.param((2, -1), ValueError, id="negative-shape"),
    ],
)
def test_bad_x(x: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        ddim(model, x, steps=2)  # type: ignore[arg-type]


def test_out_receives_the_result_and_only_a_whole_one() -> None:
    out = torch.full(SHAPE, 7.0)
    assert ddim(model, SHAPE, seed=0, steps=4, out=out) is out
    assert torch.equal(out, ddim(model, SHAPE, seed=0, steps=4))

    def fails_late(x: Tensor, t: Tensor) -> Tensor:
        if t[0] == 0:
            raise RuntimeError("late")
        return x

    out = torch.full(SHAPE, 7.0)
    with pytest.raises(RuntimeError, match="late"):
        ddim(fails_late, SHAPE, seed=0, steps=4, timesteps="leading", out=out)
    assert (out == 7).all()
    for wrong in (torch.zeros(2, 3), torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, device="meta"), [1.0]):
        with pytest.raises((TypeError, ValueError), match="out must"):
            ddim(model, SHAPE, seed=0, steps=4, out=wrong)  # type: ignore[arg-type]


def test_callback_sees_every_row_and_x0(backend: str) -> None:
    seen: list[tuple[int, int | float, Tensor, Tensor]] = []

    def look(step: Step) -> None:
        seen.append((step.index, step.t, step.x.clone(), step.x0.clone()))

    options: dict[str, Any] = dict(steps=4, timesteps="leading", eta=1.0, clip=0.5, backend=backend)
    got = ddim(model, SHAPE, seed=0, callback=look, **options)
    assert [(index, t) for index, t, _, _ in seen] == [(0, 750), (1, 500), (2, 250), (3, 0)]
    assert torch.equal(seen[-1][2], got) and torch.equal(seen[-1][3], got)
    assert all(x0.abs().max() <= 0.5 for *_, x0 in seen)
    assert torch.equal(got, ddim(model, SHAPE, seed=0, **options)), "looking changes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_callback_may_change_x(backend: str, dtype: torch.dtype) -> None:
    inputs = []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        inputs.append(x.clone())
        return x * 0.5

    def inpaint(step: Step) -> None:
        step.x[:, 0] = 0.25

    got = ddim(spy, SHAPE, steps=3, seed=0, callback=inpaint, model_dtype=dtype, backend=backend)
    assert (got[:, 0] == 0.25).all()
    assert all((x[:, 0] == 0.25).all() for x in inputs[1:]) and not (inputs[0][:, 0] == 0.25).any()


def test_a_callback_that_raises_leaves_nothing_behind() -> None:
    one = sampler(eta=1.0)
    want = one(model, SHAPE, seed=1)

    def boom(step: Step) -> None:
        if step.index == 2:
            raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        one(model, SHAPE, seed=1, callback=boom)
    assert torch.is_grad_enabled()
    assert torch.equal(one(model, SHAPE, seed=1), want)


@pytest.mark.parametrize(
    "replace",
    [
        pytest.param(lambda step: setattr(step, "x", step.x + 1), id="other-tensor"),
        pytest.param(lambda step: setattr(step.x, "data", step.x + 1), id="other-storage"),
        pytest.param(lambda step: step.x.squeeze_(0), id="other-shape"),
    ],
)
def test_replacing_x_instead_of_writing_into_it_raises(replace: object) -> None:
    with pytest.raises(ValueError, match="in place"):
        ddim(model, (1, 3, 4), steps=3, callback=replace)  # type: ignore[arg-type]


def test_iterate_gives_the_steps_of_the_call(backend: str) -> None:
    one = sampler(eta=1.0)
    states = [(step.index, step.x.clone()) for step in one.iterate(model, SHAPE, seed=9, backend=backend)]
    assert [index for index, _ in states] == list(range(6))
    assert torch.equal(states[-1][1], one(model, SHAPE, seed=9, backend=backend))


def test_iterate_checks_at_the_call_and_holds_no_mode() -> None:
    with pytest.raises(TypeError):
        sampler().iterate(model, torch.zeros(2, 3, dtype=torch.int64))
    for _ in sampler().iterate(model, SHAPE):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        weight = torch.ones(1, requires_grad=True)
        (weight * 2).sum().backward()
        break
    assert torch.is_grad_enabled()


def test_default_device_and_a_long_batch() -> None:
    with torch.device("meta"):
        got = ddim(lambda x, t: x * 0.5, ops.randn((3, 2), seed=1, device="cpu"), steps=4, eta=1.0)
    assert got.device.type == "cpu" and got.isfinite().all()


def test_the_result_is_an_ordinary_tensor() -> None:
    with torch.inference_mode():
        got = ddim(model, SHAPE, steps=3, eta=1.0)
    assert not got.is_inference() and not got.requires_grad
    weight = torch.ones((), requires_grad=True)
    (got * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("x", [SHAPE, ops.randn(SHAPE, seed=0), ops.randn((4, *SHAPE[1:]), seed=0)[::2]], ids=type)
def test_the_result_owns_its_memory(backend: str, dtype: torch.dtype, x: Tensor | tuple[int, ...]) -> None:
    """No more storage than its own, and none that the model was shown."""
    shown: list[Tensor] = []

    def keep(x: Tensor, t: Tensor) -> Tensor:
        shown.append(x)
        return x

    runs = [ddim(keep, x, seed=0, steps=3, model_dtype=dtype, backend=backend) for _ in range(2)]
    assert runs[0].untyped_storage().nbytes() == 4 * runs[0].numel() and torch.equal(*runs)
    runs[0].fill_(7.0)
    assert not (runs[1] == 7).any() and not (isinstance(x, Tensor) and (x == 7).any())


def test_parameters_that_require_gradients_do_not_make_the_result_require_them() -> None:
    layer = nn.Linear(5, 5)
    assert not ddim(lambda x, t: layer(x), SHAPE, steps=3).requires_grad


@pytest.mark.parametrize("correct", [None, lambda x0, t: x0 * 0.5], ids=["plain", "corrected"])
def test_gradients_where_x_requires_them(correct: object) -> None:
    x = ops.randn((2, 3, 2, 2), seed=2).double().requires_grad_()

    def run(x: Tensor) -> Tensor:
        return ddim(model, x, seed=0, steps=3, eta=0.5, correct_x0=correct, model_dtype=torch.float64)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, (x,), eps=1e-6, atol=1e-6)
    single = x.detach().float().requires_grad_()
    got = ddim(model, single, seed=0, steps=3, eta=0.5, correct_x0=correct)  # type: ignore[arg-type]
    assert got.requires_grad and got.dtype == torch.float32
    with torch.no_grad():
        assert not ddim(model, single, steps=3).requires_grad
        plain = ddim(model, single, seed=0, steps=3, eta=0.5, correct_x0=correct)  # type: ignore[arg-type]
    assert (plain - got).abs().max() < 1e-5


@pytest.mark.parametrize("rederive", [True, False], ids=["rederived", "kept"])
def test_correct_x0_equal_to_clipping_gives_the_clipped_chain(backend: str, rederive: bool) -> None:
    common = dict(steps=8, eta=0.7, seed=3, rederive_epsilon=rederive, backend=backend)
    clipped = ddim(model, SHAPE, clip=0.5, **common)
    corrected = ddim(model, SHAPE, correct_x0=lambda x0, t: x0.clamp(-0.5, 0.5), **common)
    assert (clipped - corrected).abs().max() < 1e-5


def test_correct_x0_comes_before_the_clamp_and_sees_the_time() -> None:
    times: list[int] = []

    def correct(x0: Tensor, t: Tensor) -> Tensor:
        times.append(int(t[0]))
        return x0 + 10

    got = ddim(model, SHAPE, steps=4, timesteps="leading", clip=0.5, correct_x0=correct)
    assert times == [750, 500, 250, 0] and torch.equal(got, torch.full(SHAPE, 0.5))
    with pytest.raises(ValueError, match="correct_x0 must return"):
        ddim(model, SHAPE, steps=4, correct_x0=lambda x0, t: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("observed", [False, True], ids=["alone", "observed"])
def test_no_tensor_is_allocated_after_the_first_step(dtype: torch.dtype, eta: float, observed: bool) -> None:
    fixed = torch.zeros(SHAPE, dtype=dtype)
    callback = (lambda step: None) if observed else None

    def allocations(steps: int) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ddim(lambda x, t: fixed, SHAPE, seed=0, steps=steps, eta=eta, model_dtype=dtype, callback=callback)
        return sum(event.name in ("aten::empty", "aten::empty_strided") for event in profile.events())

    assert 0 < allocations(5) == allocations(50)


def test_one_sampler_from_many_threads() -> None:
    one = sampler(eta=1.0)
    want = [one(model, SHAPE, seed=10 * i) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: one(model, SHAPE, seed=10 * i), range(16)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    ddim(model, SHAPE, steps=5, progress=True)
    assert "5/5" in capsys.readouterr().err


def test_schedule_and_device_of_the_model() -> None:
    class Own(nn.Module):
        schedule = Schedule.cosine(50)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return model(x, t)

    got = ddim(Own(), SHAPE, seed=0, steps=10)
    assert torch.equal(got, ddim(model, SHAPE, seed=0, schedule=Schedule.cosine(50), steps=10))
    Own.schedule = "linear"  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"model\.schedule"):
        ddim(Own(), SHAPE)
    with pytest.raises(TypeError, match="callable"):
        ddim("model", SHAPE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="callback"):
        ddim(model, SHAPE, callback=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model_kwargs"):
        ddim(model, SHAPE, model_kwargs=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model_dtype"):
        ddim(model, SHAPE, model_dtype=torch.int64)
