"""Tensors without memory of their own, and memory that user code takes away: errors, never a crash."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastsample
from fastsample import DDPM, DPMSolver, Schedule, Table
from fastsample.ops import LowRank, likelihood, lora_linear, pack_adapters, pack_linear, posterior, randn, step

SHAPE = (2, 4, 4)
TABLE = Table([9, 4], p=1.0, q=-0.5, a=0.5, b=0.25, c1=[0.0, 0.5], s=0.5)


def fake(shape: Sequence[int]) -> Tensor:
    with FakeTensorMode():
        return torch.zeros(shape)


def freed(shape: Sequence[int]) -> Tensor:
    tensor = torch.zeros(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def nested(shape: Sequence[int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([*torch.zeros(shape)])


# By kind: in all of them an address is 0, or is not that of dense values.
WITHOUT_MEMORY: dict[str, Callable[[Sequence[int]], Tensor]] = {
    "fake": fake,
    "freed": freed,
    "nested": nested,
    "jagged": lambda shape: torch.nested.nested_tensor([*torch.zeros(shape)], layout=torch.jagged),
    "sparse": lambda shape: torch.zeros(shape).to_sparse(),
    "mkldnn": lambda shape: torch.zeros(shape).to_mkldnn(),
    "zero tensor": lambda shape: torch._efficientzerotensor(shape),
    "meta": lambda shape: torch.zeros(shape, device="meta"),
}
kinds = pytest.mark.parametrize("kind", WITHOUT_MEMORY)


@kinds
def test_a_model_that_returns_one(kind: str) -> None:
    given = WITHOUT_MEMORY[kind](SHAPE)
    with pytest.raises((TypeError, ValueError), match="model_output"):
        fastsample.ddim(lambda x, t: given, SHAPE, steps=2)


@kinds
@pytest.mark.parametrize("name", ["noise", "out", "x0_out", "history[0]", "input_out"])
def test_as_an_operand_it_is_not_absent(kind: str, name: str) -> None:
    given = WITHOUT_MEMORY[kind](SHAPE)
    keyword, value = ("history", [given]) if name == "history[0]" else (name, given)
    x = torch.zeros(SHAPE)
    options = {"noise": x, "history": [x], keyword: value}
    with pytest.raises((TypeError, ValueError), match=name.replace("[", r"\[")):
        step(x, x, TABLE, 1, **options)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "change"),
    {
        "x0 replaced": ("step.x0", lambda step: setattr(step.x0, "data", step.x0.data.clamp(-1, 1))),
        "x replaced": ("step.x", lambda step: setattr(step.x, "data", step.x.data.clone())),
        "x0 larger": ("step.x0", lambda step: step.x0.resize_(4096)),
        "x larger": ("step.x", lambda step: step.x.resize_(4096)),
        "x0 set": ("step.x0", lambda step: step.x0.set_(torch.zeros(SHAPE))),
        "x set": ("step.x", lambda step: step.x.set_(torch.zeros(SHAPE))),
        "x transposed": ("step.x", lambda step: step.x.transpose_(1, 2)),
        "x0 transposed": ("step.x0", lambda step: step.x0.transpose_(1, 2)),
        "x0 freed": ("step.x0", lambda step: step.x0.untyped_storage().resize_(0)),
        "x0 another": ("step.x0", lambda step: setattr(step, "x0", step.x0.clone())),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_callback_that_takes_memory_away(name: str, change: Callable[[object], object], order: int) -> None:
    sampler = DPMSolver(Schedule.linear(), steps=4, order=order)
    with pytest.raises(ValueError, match=f"{name} was replaced"):
        sampler(lambda x, t: 0.1 * x, SHAPE, seed=0, callback=change)


def test_a_callback_that_writes_in_place_is_heard() -> None:
    sampler = DPMSolver(Schedule.linear(), steps=4, order=2)
    plain = sampler(lambda x, t: 0.1 * x, SHAPE, seed=0)
    clamped = sampler(lambda x, t: 0.1 * x, SHAPE, seed=0, callback=lambda step: step.x0.clamp_(-1, 1))
    assert not torch.equal(plain, clamped)


def transpose(x: Tensor) -> None:
    x.transpose_(1, 2)


PACKED = pack_linear([torch.eye(4)])
GAUSSIAN = DDPM(Schedule.linear(10)).table
ONE = torch.ones(())
OPS: dict[str, tuple[str, Sequence[int], Callable[[Tensor], object]]] = {
    "pack_linear": ("weights", (4, 4), lambda given: pack_linear([given])),
    "pack_linear's bias": ("biases", (4,), lambda given: pack_linear([torch.eye(4)], [given])),
    "pack_adapters": (
        "groups",
        (4, 4),
        lambda given: pack_adapters(PACKED, [[LowRank(torch.zeros(4, 4), given, ONE)]]),
    ),
    "lora_linear": ("x", SHAPE, lambda given: lora_linear(given, PACKED)),
    "posterior": ("model_output", SHAPE, lambda given: posterior(torch.zeros(SHAPE), given, GAUSSIAN, 0)),
    "posterior of x": ("x", SHAPE, lambda given: posterior(given, torch.zeros(SHAPE), GAUSSIAN, 0)),
    "likelihood": (
        "model_output",
        SHAPE,
        lambda given: likelihood(torch.zeros(SHAPE), torch.zeros(SHAPE), given, GAUSSIAN, 0),
    ),
    "randn": ("out", SHAPE, lambda given: randn(SHAPE, out=given)),
}


@pytest.mark.parametrize("kind", ["freed", "sparse", "mkldnn"])
@pytest.mark.parametrize("name", OPS)
def test_ops(name: str, kind: str) -> None:
    named, shape, call = OPS[name]
    given = WITHOUT_MEMORY[kind](shape)
    with pytest.raises((TypeError, ValueError), match=named):
        call(given)


@pytest.mark.parametrize("name", ["pack_linear", "pack_linear's bias", "pack_adapters"])
def test_fake_weights(name: str) -> None:
    named, shape, call = OPS[name]
    given = fake(shape)
    with pytest.raises(TypeError, match=named):
        call(given)


def test_functional_weights() -> None:
    with pytest.raises(TypeError, match="weights"):
        torch.func.functionalize(lambda weight: pack_linear([weight]).data)(torch.eye(4))


@pytest.mark.parametrize(
    "take",
    {
        "replaced": lambda x: setattr(x, "data", x.data.clone()),
        "larger": lambda x: x.resize_(4096),
        "set": lambda x: x.set_(torch.zeros(SHAPE)),
        "transposed": transpose,
    }.values(),
    ids=["replaced", "larger", "set", "transposed"],
)
@pytest.mark.parametrize("argument", ["x", "t"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_model_that_takes_memory_away(guided: bool, argument: str, take: Callable[[Tensor], object]) -> None:
    if argument == "t" and take is transpose:
        pytest.skip("t has one axis")
    options = {"guidance": 2.0, "cond": {}, "uncond": {}} if guided else {}
    sampler = DPMSolver(Schedule.linear(), steps=4, order=2)

    def model(x: Tensor, t: Tensor) -> Tensor:
        m = 0.1 * x
        take(x if argument == "x" else t)
        return m

    want = sampler(lambda x, t: 0.1 * x, SHAPE, seed=0, **options)
    with pytest.raises((ValueError, RuntimeError), match=argument):
        sampler(model, SHAPE, seed=0, **options)
    assert torch.equal(sampler(lambda x, t: 0.1 * x, SHAPE, seed=0, **options), want)


def test_a_correction_that_takes_memory_away() -> None:
    def correct(take: Callable[[Tensor], object]) -> Callable[[Tensor, Tensor], Tensor]:
        def corrected(x0: Tensor, t: Tensor) -> Tensor:
            clamped = x0.clamp(-1, 1)
            take(x0)
            return clamped

        return corrected

    def run(take: Callable[[Tensor], object]) -> Tensor:
        return fastsample.ddim(lambda x, t: 0.1 * x, SHAPE, steps=4, seed=0, correct_x0=correct(take))

    want = run(lambda x0: None)
    assert torch.equal(run(lambda x0: setattr(x0, "data", torch.zeros(SHAPE))), want)
    with pytest.raises(ValueError, match="correct_x0"):
        run(lambda x0: x0.resize_(4096))
