"""Tensors without memory of their own, and memory that user code takes away: errors, never a crash."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastsample
from fastsample import DDPM, DPMSolver, Schedule, Table
from fastsample.ops import LowRank, likelihood, lora_linear, pack_adapters, pack_linear, posterior, randn, step

SHAPE = (2, 4, 4)
TABLE = Table([9, 4], p=1.0, q=-0.5, a=0.5, b=0.25, c1=[0.0, 0.5], s=0.5)


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.zeros(SHAPE)


def freed() -> Tensor:
    tensor = torch.zeros(SHAPE)
    tensor.untyped_storage().resize_(0)
    return tensor


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(4, 4), torch.zeros(4, 4)])


# By kind: in all of them an address is 0, or is not that of dense values.
WITHOUT_MEMORY: dict[str, Callable[[], Tensor]] = {
    "fake": fake,
    "freed": freed,
    "nested": nested,
    "jagged": lambda: torch.nested.nested_tensor([torch.zeros(4, 4), torch.zeros(4, 4)], layout=torch.jagged),
    "sparse": lambda: torch.zeros(SHAPE).to_sparse(),
    "mkldnn": lambda: torch.zeros(SHAPE).to_mkldnn(),
    "zero tensor": lambda: torch._efficientzerotensor(SHAPE),
    "meta": lambda: torch.zeros(SHAPE, device="meta"),
}
kinds = pytest.mark.parametrize("kind", WITHOUT_MEMORY)


@kinds
def test_a_model_that_returns_one(kind: str) -> None:
    given = WITHOUT_MEMORY[kind]()
    with pytest.raises((TypeError, ValueError), match="model_output"):
        fastsample.ddim(lambda x, t: given, SHAPE, steps=2)


@kinds
@pytest.mark.parametrize("name", ["noise", "out", "x0_out", "history[0]", "input_out"])
def test_as_an_operand_it_is_not_absent(kind: str, name: str) -> None:
    given = WITHOUT_MEMORY[kind]()
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


PACKED = pack_linear([torch.eye(4)])
OPS: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "pack_linear": ("weights", lambda given: pack_linear([given[0]])),
    "pack_linear's bias": ("biases", lambda given: pack_linear([torch.eye(4)], [given[0, 0]])),
    "pack_adapters": (
        "groups",
        lambda given: pack_adapters(PACKED, [[LowRank(torch.zeros(4, 4), given[0], torch.ones(()))]]),
    ),
    "lora_linear": ("x", lambda given: lora_linear(given, PACKED)),
    "posterior": ("model_out", lambda given: posterior(torch.zeros(SHAPE), given, GAUSSIAN, 0)),
    "posterior of": ("x", lambda given: posterior(given, torch.zeros(SHAPE), GAUSSIAN, 0)),
    "likelihood": ("model_out", lambda given: likelihood(torch.zeros(SHAPE), torch.zeros(SHAPE), given, GAUSSIAN, 0)),
    "randn": ("out", lambda given: randn(SHAPE, out=given)),
}
GAUSSIAN = DDPM(Schedule.linear(10)).table


@pytest.mark.parametrize("kind", ["fake", "freed", "sparse", "mkldnn", "zero tensor"])
@pytest.mark.parametrize("name", OPS)
def test_ops(name: str, kind: str) -> None:
    named, call = OPS[name]
    given = WITHOUT_MEMORY[kind]()
    if "given[0" in inspect.getsource(call) and kind in ("sparse", "mkldnn"):
        pytest.skip("cannot be indexed")
    with pytest.raises((TypeError, ValueError), match=named):
        call(given)


def test_functional_weights() -> None:
    with pytest.raises(TypeError, match="weights"):
        torch.func.functionalize(lambda weight: pack_linear([weight]).data)(torch.eye(4))
