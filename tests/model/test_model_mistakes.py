"""What a model may not do, or does by mistake: inputs written, wrong batches, training mode."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsample
from fastsample import DDIM, Schedule, ddim, ops
from support.networks import Net

SHAPE = (2, 4, 6, 5)
X = ops.randn(SHAPE, seed=1)
HALF = torch.float16


def writes_x(x: Tensor, t: Tensor) -> Tensor:
    return x.mul_(0.5)


def writes_t(x: Tensor, t: Tensor) -> Tensor:
    t += 1
    return 0.1 * x


def writes_a_view(x: Tensor, t: Tensor) -> Tensor:
    x[:, 0].clamp_(-1, 1)
    return 0.1 * x


RUNS: dict[str, Callable[[Any], object]] = {
    "plain": lambda model: ddim(model, X, steps=2),
    "from-a-shape": lambda model: ddim(model, SHAPE, steps=2),
    "guided": lambda model: ddim(model, X, steps=2, guidance=2.0, uncond={}),
    "outside-the-interval": lambda model: ddim(model, X, steps=2, guidance=2.0, uncond={}, guidance_interval=(0, 499)),
    "half": lambda model: ddim(model, X, steps=2, model_dtype=HALF),
    "reference": lambda model: ddim(model, X, steps=2, backend="reference"),
    "double": lambda model: ddim(model, X.double(), steps=2),
    "watched": lambda model: ddim(model, X, steps=2, callback=lambda step: None),
    "iterate": lambda model: list(DDIM(Schedule.linear(), steps=2).iterate(model, X)),
    "gradients": lambda model: ddim(model, X.clone().requires_grad_(), steps=2),
    "inference-mode": lambda model: torch.inference_mode()(ddim)(model, X, steps=2),
    "multistep": lambda model: fastsample.dpm_solver(model, X, steps=2),
    "batcher": lambda model: (
        fastsample.Batcher(model, DDIM(Schedule.linear(), steps=2), batch=2).submit(SHAPE[1:], seed=1).result()
    ),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(writes_x, "x", id="x"),
        pytest.param(writes_t, "t", id="t"),
        pytest.param(writes_a_view, "x", id="view-of-x"),
    ],
)
def test_a_model_that_writes_its_input_is_refused(run: str, model: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"the model wrote to its argument {name} in place"):
        RUNS[run](model)


@pytest.mark.parametrize("run", RUNS)
def test_a_model_may_return_its_input(run: str) -> None:
    """As it is or as a view: what a step writes in place is then also what it reads."""

    def tensors(value: Any) -> list[Tensor]:
        return [value.detach()] if isinstance(value, Tensor) else [step.x for step in value]

    torch.manual_seed(0)
    want = tensors(RUNS[run](lambda x, t: x.clone()))
    for view in (lambda x: x, lambda x: x.view(x.shape), lambda x: x.flatten(1).unflatten(1, x.shape[1:])):
        torch.manual_seed(0)
        got = tensors(RUNS[run](lambda x, t, view=view: view(x)))
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_a_view_of_the_input_in_another_order_is_read_before_it_is_written() -> None:
    x = ops.randn((2, 4, 5, 5), seed=3)
    for guided in ({}, {"guidance": 2.0, "uncond": {}}):
        got = ddim(lambda x, t: x.mT, x, steps=3, **guided)  # type: ignore[arg-type]
        assert torch.equal(got, ddim(lambda x, t: x.mT.clone(), x, steps=3, **guided))  # type: ignore[arg-type]
        expanded = ddim(lambda x, t: x[:, :1].expand(x.shape), x, steps=3, **guided)  # type: ignore[arg-type]
        assert torch.equal(expanded, ddim(lambda x, t: x[:, :1].repeat(1, 4, 1, 1), x, steps=3, **guided))  # type: ignore[arg-type]


def test_gradients_that_a_model_takes_of_its_input_end_with_the_call() -> None:
    """Energy-based models: x.grad of one row must not add to that of the next."""

    def energy(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            (0.05 * x.requires_grad_() ** 2).sum().backward()
        return x.grad

    for options in ({}, {"guidance": 2.0, "uncond": {}}, {"model_dtype": HALF}):
        got = ddim(energy, X, steps=4, **options)  # type: ignore[arg-type]
        want = ddim(lambda x, t: 0.1 * x, X, steps=4, **options)  # type: ignore[arg-type]
        assert not got.requires_grad and got.grad is None
        assert (got - want).abs().max() <= 4 * 2**-9 * want.abs().max()


@pytest.mark.parametrize("rows", [1, 2, 3, 8], ids=lambda rows: f"{rows}-of-4")
def test_the_batch_of_a_guided_output(backend: str, rows: int) -> None:
    def some(x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros(rows, *SHAPE[1:]) if len(x) == 4 else 0.1 * x

    with pytest.raises(ValueError, match=r"an output for every sample that it is given.*: 4 in this row"):
        ddim(some, X, steps=2, guidance=2.0, uncond={}, backend=backend)


def test_outside_the_interval_the_output_is_that_of_one_half(backend: str) -> None:
    def doubled(x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * (torch.cat([x, x]) if len(x) == 2 else x)

    options: dict[str, Any] = dict(steps=4, guidance=2.0, uncond={}, guidance_interval=(0, 300), backend=backend)
    with pytest.raises(ValueError, match=r"an output for every sample that it is given.*: 2 in this row"):
        ddim(doubled, X, **options)
    with pytest.raises(ValueError, match="every sample"):
        ddim(lambda x, t: torch.tensor(0.5), X, **options)
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="every sample"):
        ddim(doubled, x, **{**options, "backend": None})


def test_a_batcher_compares_batches_too() -> None:
    batcher = fastsample.Batcher(
        lambda x, t: 0.1 * x[: len(x) // 2], DDIM(Schedule.linear(), steps=2), batch=2, guidance=2.0, uncond={}
    )
    batcher.submit(SHAPE[1:], seed=1)
    with pytest.raises(ValueError, match="every sample"):
        batcher.step()


def warnings_of(model: Any, times: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            ddim(model, X, steps=2, schedule=Schedule.linear())
    assert all(one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


def test_training_mode_is_warned_of_once_for_each_model() -> None:
    net = Net().train()
    (message,) = warnings_of(net, times=3)
    assert "Net is in training mode" in message and ".eval()" in message
    assert warnings_of(lambda x, t: net(x, t)) == [], "it is the same model"
    assert len(warnings_of(Net().train())) == 1, "another model"
    other = Net().train()
    assert len(warnings_of(lambda x, t: other(x, t))) == 1
    assert warnings_of(Net()) == []


@pytest.mark.parametrize(
    "part", [nn.Dropout(0.5), nn.Dropout2d(0.1), nn.BatchNorm2d(4)], ids=lambda one: type(one).__name__
)
def test_a_part_in_training_mode_is_warned_of(part: nn.Module) -> None:
    net = Net(part=nn.Sequential(part.train()))
    net.eval()
    assert warnings_of(net) == []
    part.train()
    (message,) = warnings_of(net, times=2)
    assert f"Net has a {type(part).__name__} in training mode" in message
    part.eval()


def test_parts_that_are_the_same_in_both_modes_are_not_warned_of() -> None:
    net = Net()
    net.conv.train()
    assert warnings_of(net) == []


def test_the_warning_keeps_no_model_alive() -> None:
    net = Net().train()
    warnings_of(net)
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


class Wrapper(nn.Module):
    """Of a function, as models for tests and guidance are written: without parameters of its own."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x


def test_a_module_with_nothing_to_train_is_not_warned_of() -> None:
    act = nn.SiLU()
    assert warnings_of(lambda x, t: act(x)) == []
    assert warnings_of(Wrapper()) == []
    assert warnings_of(Wrapper(act=nn.SiLU(), flat=nn.Flatten(), norm=nn.LayerNorm(3, elementwise_affine=False))) == []


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.Dropout(0.1), "Wrapper has a Dropout in training mode"),
        (nn.BatchNorm2d(4, affine=False), "Wrapper has a BatchNorm2d in training mode"),
        (nn.Linear(2, 2), "Wrapper is in training mode"),
    ],
    ids=["dropout", "batch-norm", "linear"],
)
def test_what_a_wrapper_holds_is_warned_of(part: nn.Module, message: str) -> None:
    assert [message in one for one in warnings_of(Wrapper(part=part))] == [True]


def test_a_prepared_run_warns_where_a_part_is_put_into_training_later() -> None:
    part = nn.Dropout(0.5)
    net = Net(part=nn.Sequential(part)).eval()
    run = DDIM(Schedule.linear(), steps=2).prepare(net, X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(seed=0)
        assert not caught
        part.train()
        run(seed=0)
        run(seed=0)
    (warning,) = caught
    assert "Net has a Dropout in training mode" in str(warning.message)
