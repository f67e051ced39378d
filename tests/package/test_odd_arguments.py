"""What is no number, no tensor or out of range is refused by name, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import DDIM, DDPM, DPMSolver, Schedule, Table, spaced_timesteps
from fastsample.ops import LowRank, lora_linear, pack_adapters, pack_linear, posterior, randn, step
from fastsample.times.continuous import karras_sigmas, spaced_levels
from fastsample.times.flow import flow_levels
from fastsample.times.timesteps import descending_times

NAN, INF = float("nan"), float("inf")
SHAPE = (2, 3, 4)
X = torch.zeros(SHAPE)
TABLE = Table([9, 4], p=1.0, q=-0.5, a=0.5, b=0.25, c1=[0.0, 0.5])
GAUSSIAN = DDPM(Schedule.linear(10)).table
PACKED = pack_linear([torch.eye(4)])
LINEAR = Schedule.linear(100)


def model(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the model is not called")


NO_INTS: list[Any] = ["5", 1.5, NAN, INF, True, None, 1j, [1, 2], np.array([1, 2]), torch.tensor(1.5)]
NO_NUMBERS: list[Any] = ["5", True, None, 1j, [1.0, 2.0], torch.tensor(True), np.array([1.0, 2.0])]
NO_ARRAYS: list[Any] = [["5"], [True, False], [1j, 2.0], np.array([1j]), np.array([None]), [object()], [[1], [1, 2]]]
NO_ARRAYS += [torch.ones(2).to_sparse(), torch.ones(2, device="meta")]

INTS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "T": ("T", lambda odd: spaced_timesteps(odd, "leading", 5)),
    "T of a schedule": ("T", lambda odd: Schedule.linear(odd)),
    "T of a cosine": ("T", lambda odd: Schedule.cosine(odd)),
    "steps_offset": ("steps_offset", lambda odd: spaced_timesteps(100, "leading", 5, steps_offset=odd)),
    "original_steps": ("original_steps", lambda odd: spaced_timesteps(100, "lcm", 5, original_steps=odd)),
    "steps of karras": ("steps", lambda odd: karras_sigmas(80.0, 0.1, odd)),
    "steps of levels": ("steps", lambda odd: spaced_levels(LINEAR, "karras", odd)),
    "steps of flow": ("steps", lambda odd: flow_levels("linspace", odd)),
    "step": ("step", lambda odd: randn(SHAPE, step=odd)),
    "stream": ("stream", lambda odd: randn(SHAPE, stream=odd)),
    "row": ("row", lambda odd: step(X, X, TABLE, odd, history=[X])),
    "row of a posterior": ("row", lambda odd: posterior(X, X, GAUSSIAN, odd)),
}
NUMBERS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "beta_start": ("beta_start", lambda odd: Schedule.linear(10, beta_start=odd)),
    "beta_end": ("beta_end", lambda odd: Schedule.scaled_linear(10, beta_end=odd)),
    "s": ("s must", lambda odd: Schedule.cosine(10, s=odd)),
    "max_beta": ("max_beta", lambda odd: Schedule.cosine(10, max_beta=odd)),
    "sigma_max": ("sigma_max", lambda odd: karras_sigmas(odd, 0.1, 5)),
    "sigma_min": ("sigma_min", lambda odd: karras_sigmas(80.0, odd, 5)),
    "rho": ("rho", lambda odd: karras_sigmas(80.0, 0.1, 5, rho=odd)),
    "shift": ("shift", lambda odd: flow_levels("linspace", 5, shift=odd)),
    "init_noise_sigma": ("init_noise_sigma", lambda odd: Table([0], p=1.0, init_noise_sigma=odd)),
    "guidance_rescale": (
        "guidance_rescale",
        lambda odd: step(X, torch.cat([X, X]), TABLE, 0, guidance=2.0, guidance_rescale=odd),
    ),
}
ARRAYS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "alphas_cumprod": ("alphas_cumprod", Schedule.from_alphas_cumprod),
    "betas": ("betas", Schedule.from_betas),
    "t": ("t ", lambda odd: Table(odd, p=1.0)),
    "column": ("column p", lambda odd: Table([0], p=odd)),
    "alpha": ("alpha", lambda odd: Table([0], p=1.0, alpha=odd, sigma=[1.0, 0.0])),
    "timesteps": ("timesteps", lambda odd: spaced_timesteps(100, odd)),
    "times": ("timesteps", descending_times),
}


@pytest.mark.parametrize("odd", NO_INTS, ids=repr)
@pytest.mark.parametrize("name", INTS)
def test_no_ints(name: str, odd: Any) -> None:
    named, call = INTS[name]
    with pytest.raises((TypeError, ValueError), match=named):
        call(odd)


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("odd", [-3, 2**70, -(2**70)], ids=str)
def test_ints_out_of_range(name: str, odd: int) -> None:
    named, call = INTS[name]
    if name.startswith("steps of") and odd == 2**70:
        pytest.skip("as many as memory holds")
    if name == "row of a posterior" and odd == -3:
        pytest.skip("counts from the end")
    with pytest.raises(ValueError, match="timestep -3|steps_offset" if name == "steps_offset" else named):
        call(odd)


@pytest.mark.parametrize("number", [np.int64(1), np.uint8(1), np.array(1), torch.tensor(1)], ids=repr)
@pytest.mark.parametrize("name", INTS)
def test_integers_of_numpy_and_torch(name: str, number: Any) -> None:
    _, call = INTS[name]
    if name.startswith("T"):
        number = number + type(number)(5) if isinstance(number, np.generic) else number + 5
    if name == "original_steps":
        number = number + number + number + number + number
    call(number)


@pytest.mark.parametrize("odd", [*NO_NUMBERS, NAN, -1.0, -INF], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_no_numbers(name: str, odd: Any) -> None:
    named, call = NUMBERS[name]
    with pytest.raises((TypeError, ValueError), match="beta" if name.startswith("beta") else named):
        call(odd)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch(name: str, kind: Callable[[float], Any]) -> None:
    _, call = NUMBERS[name]
    call(kind(0.5))


# An address in an id would differ from run to run.
@pytest.mark.parametrize("odd", NO_ARRAYS, ids=lambda odd: repr(odd).split(" at 0x")[0])
@pytest.mark.parametrize("name", ARRAYS)
def test_no_arrays(name: str, odd: Any) -> None:
    named, call = ARRAYS[name]
    with pytest.raises((TypeError, ValueError), match=named):
        call(odd)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "kind",
    [
        list,
        np.array,
        lambda values: np.array(values, dtype=np.float32),
        lambda values: torch.tensor(values, requires_grad=True),
        lambda values: torch.tensor(values, dtype=torch.bfloat16),
        lambda values: np.array(values, dtype=object),
        lambda values: [torch.tensor(value, requires_grad=True) for value in values],
        lambda values: torch.nn.Parameter(torch.tensor(values)),
    ],
    ids=["list", "float64", "float32", "gradients", "bfloat16", "objects", "tensors", "parameter"],
)
def test_arrays_of_all_kinds(kind: Callable[[list[float]], Any]) -> None:
    values = [0.75, 0.5, 0.25]
    assert Schedule.from_alphas_cumprod(kind(values)).alphas_cumprod.tolist() == values
    assert Table([2, 1, 0], p=kind(values)).p.tolist() == values
    assert Table(kind(values), p=1.0).t.tolist() == values


def test_unsigned_times_do_not_wrap() -> None:
    assert Table(np.array([5, 1], dtype=np.uint64), p=1.0).times == (5, 1)
    with pytest.raises(ValueError, match="t holds"):
        Table(np.array([2**63], dtype=np.uint64), p=1.0)
    with pytest.raises(ValueError, match="timesteps"):
        spaced_timesteps(100, np.array([2**63], dtype=np.uint64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: karras_sigmas(0.1, 80.0, 5), "sigma_min", id="the wrong way round"),
        pytest.param(lambda: karras_sigmas(INF, 1.0, 5), "sigma_max", id="from infinity"),
        pytest.param(lambda: spaced_timesteps(100, [INF]), "timesteps", id="infinite time"),
        pytest.param(lambda: spaced_timesteps(100, []), "timesteps", id="no times"),
        pytest.param(lambda: spaced_timesteps(100, None), "timesteps", id="no spacing"),  # type: ignore[arg-type]
    ],
)
def test_ranges(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def options_of_step(**options: Any) -> Callable[[], object]:
    return lambda: step(X, X, TABLE, 1, **{"history": [X], **options})


OUT = {
    "expanded": lambda: torch.zeros(1, 3, 4).expand(SHAPE),
    "of another shape": lambda: torch.zeros(2, 3),
    "of another dtype": lambda: torch.zeros(SHAPE, dtype=torch.float16),
    "elsewhere": lambda: torch.zeros(SHAPE, device="meta"),
    "with gradients": lambda: torch.zeros(SHAPE, requires_grad=True),
    "of inference mode": lambda: torch.inference_mode()(torch.zeros)(SHAPE),
    "no tensor": lambda: np.zeros(SHAPE),
}
TAKES_OUT: dict[str, tuple[str, Callable[[Any], object]]] = {
    "step": ("out", lambda out: step(X, X, TABLE, 0, out=out)),
    "x0 of a step": ("x0_out", lambda out: step(X, X, TABLE, 0, x0_out=out)),
    "step of the reference": ("out", lambda out: step(X, X, TABLE, 0, out=out, backend="reference")),
    "randn": ("out", lambda out: randn(SHAPE, out=out)),
    "a run": ("out", lambda out: fastsample.ddim(model, SHAPE, steps=2, out=out)),
    "an object": ("out", lambda out: DDIM(LINEAR, steps=2)(model, SHAPE, out=out)),
}


@pytest.mark.parametrize("kind", OUT)
@pytest.mark.parametrize("name", TAKES_OUT)
def test_out(name: str, kind: str) -> None:
    named, call = TAKES_OUT[name]
    if kind == "with gradients" and name in ("a run", "an object"):
        pytest.skip("runs are without gradients")
    if kind == "elsewhere" and name == "randn":
        pytest.skip("out alone says where")
    with pytest.raises((TypeError, ValueError), match=named):
        call(OUT[kind]())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(options_of_step(history=X), "history", id="history is a tensor"),
        pytest.param(options_of_step(history=None), "history", id="no history"),
        pytest.param(options_of_step(history=[None]), r"history\[0\]", id="history of nothing"),
        pytest.param(options_of_step(history=[X] * 4), "history", id="history of four"),
        pytest.param(options_of_step(guidance_rescale=0.5), "guidance_rescale", id="rescale without guidance"),
        pytest.param(options_of_step(guidance=True), "guidance", id="guidance is a bool"),
        pytest.param(options_of_step(guidance="2"), "guidance", id="guidance is text"),
        pytest.param(options_of_step(guidance=1j), "guidance", id="guidance is complex"),
        pytest.param(options_of_step(guidance=torch.tensor([1j, 1j])), "guidance", id="guidance is a complex tensor"),
        pytest.param(options_of_step(guidance=2**70), "guidance|model_output", id="guidance is large"),
        pytest.param(options_of_step(backend=""), "backend", id="backend is empty"),
        pytest.param(options_of_step(backend=5), "backend", id="backend is a number"),
        pytest.param(options_of_step(noise=5), "noise", id="noise is a number"),
        pytest.param(options_of_step(x0_out=[X]), "x0_out", id="x0_out is a list"),
        pytest.param(options_of_step(input_out=X.long()), "input_out", id="input_out of integers"),
        pytest.param(lambda: lora_linear(X, torch.eye(4)), "packed", id="packed"),  # type: ignore[arg-type]
        pytest.param(lambda: lora_linear(X, PACKED, [X]), "adapters", id="adapters"),  # type: ignore[arg-type]
        pytest.param(lambda: pack_linear(torch.eye(4)), "weights", id="weights is a tensor"),
        pytest.param(lambda: pack_linear(None), "weights", id="no weights"),  # type: ignore[arg-type]
        pytest.param(lambda: pack_linear([None]), "weights", id="weights of nothing"),  # type: ignore[list-item]
        pytest.param(lambda: pack_linear([torch.eye(4)], torch.zeros(1, 4)), "biases", id="biases is a tensor"),
        pytest.param(lambda: pack_adapters(None, []), "packed", id="no packed"),  # type: ignore[arg-type]
        pytest.param(lambda: pack_adapters(PACKED, None), "groups", id="no groups"),  # type: ignore[arg-type]
        pytest.param(lambda: pack_adapters(PACKED, [5]), "groups", id="groups of numbers"),  # type: ignore[list-item]
        pytest.param(
            lambda: pack_adapters(PACKED, [[(X, X, X)]]),  # type: ignore[list-item]
            r"groups\[0\]\[0\]",
            id="groups of tuples",
        ),
        pytest.param(
            lambda: pack_adapters(PACKED, [[LowRank(torch.zeros(1, 4), torch.zeros(4, 1), 1.0)]]),  # type: ignore[arg-type]
            r"groups\[0\]\[0\]",
            id="scale is a number",
        ),
        pytest.param(lambda: randn(5), "shape", id="shape is a number"),  # type: ignore[arg-type]
        pytest.param(lambda: randn((2**70, 2)), "shape", id="shape is large"),
        pytest.param(lambda: randn((2.0, 3)), "shape", id="shape of floats"),  # type: ignore[arg-type]
    ],
)
def test_ops(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    "make",
    [lambda: DDIM(LINEAR, steps=2, correct_x0=5), lambda: DPMSolver(LINEAR, steps=2, correct_x0=5)],  # type: ignore[arg-type]
    ids=["DDIM", "DPMSolver"],
)
def test_a_correction_that_cannot_be_called(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="correct_x0"):
        make()


def test_a_device_of_number_0_is_a_gpu() -> None:
    if torch.cuda.is_available():
        assert randn(SHAPE, device=0).is_cuda
    else:
        with pytest.raises(ValueError, match=r"^device '0' cannot be used"):
            randn(SHAPE, device=0)


def test_numpys_integers_in_a_shape() -> None:
    shape = np.array(SHAPE)
    assert torch.equal(randn(shape, seed=1), randn(SHAPE, seed=1))
    assert torch.equal(randn([np.int32(2), np.uint8(3)], seed=1), randn((2, 3), seed=1))
