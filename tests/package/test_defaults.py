"""torch's default dtype and device govern what the caller makes, not what the library computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastsample
from fastsample import DDIM, DDPM, Batcher, Schedule, lora, ops, zoo
from support.whole_runs import COND, RUNS, SHAPE, Run, X

MODEL_OUTPUT = 0.25 * X
PAIR = {"0.lora_A.weight": torch.ones(2, 4), "0.lora_B.weight": torch.ones(3, 2)}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = [
    pytest.param(lambda: default_dtype(torch.bfloat16), id="bfloat16"),
    pytest.param(lambda: default_dtype(torch.float64), id="float64"),
    pytest.param(lambda: torch.device("meta"), id="meta"),
]


def flat(value: Any) -> list[Tensor]:
    """The tensors in a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value)]
    return [tensor for one in value for tensor in flat(one)] if isinstance(value, list | tuple) else []


def same(function: Callable[[], Any], default: Callable[[], Any]) -> None:
    # First: what is worked out once and kept would otherwise be there already.
    with default():
        got = flat(function())
    want = flat(function())
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and one.device == other.device
        assert torch.equal(one, other)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("run", [pytest.param(run, id=name) for name, run in RUNS.items()])
def test_whole_runs(run: Run, default: Callable[[], Any]) -> None:
    same(lambda: run.make()(run.model, run.x, **{"seed": 5, **run.options}), default)


UNET = zoo.UNet(zoo.UNetConfig(3, 4, 2, (8, 8), 8, 2, 2), Schedule.linear()).eval()
for parameter in UNET.parameters():  # some begin as zeros
    parameter.data = torch.linspace(-0.3, 0.4, parameter.numel(), device="cpu").reshape(parameter.shape)
LEARNED = DDPM(Schedule.linear(), steps=5, variance="learned_range").table
FUNCTIONS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: fastsample.ddim(lambda x, t: 0.1 * x, SHAPE, steps=2, seed=3),
    "x-given": lambda: fastsample.ddim(lambda x, t: 0.1 * x, X, steps=2),
    "reference": lambda: fastsample.ddim(lambda x, t: 0.1 * x, X, steps=2, backend="reference", eta=1.0, seed=[4, 7]),
    "double": lambda: fastsample.ddim(lambda x, t: 0.1 * x, X.double(), steps=2, eta=1.0, seed=2),
    "gradients": lambda: fastsample.ddim(lambda x, t: 0.1 * x, X.clone().requires_grad_(), steps=2).detach(),
    "generator": lambda: fastsample.ddim(
        lambda x, t: 0.1 * x, X, steps=2, eta=1.0, noise=torch.Generator("cpu").manual_seed(3)
    ),
    "decode": lambda: fastsample.ddim(lambda x, t: 0.1 * x, X, steps=2, decode=lambda x: x * 2),
    "embedding": lambda: fastsample.guidance_scale_embedding(7.5, 256),
    "embeddings": lambda: fastsample.guidance_scale_embedding([1.0, 7.5], 256),
    "told": lambda: fastsample.lcm(Told(), SHAPE, guidance_embedding=7.5, seed=3, schedule=Schedule.linear()),
    "add_noise": lambda: fastsample.add_noise(X, 500, schedule=Schedule.linear(), seed=2),
    "velocity": lambda: fastsample.velocity(
        X, MODEL_OUTPUT, torch.tensor([3, 500], device="cpu"), schedule=Schedule.linear()
    ),
    "interpolate": lambda: fastsample.interpolate(
        lambda x, t: 0.1 * x, X[:1], X[1:], 3, sampler=DDIM(Schedule.linear(), steps=3)
    ),
    "slerp": lambda: fastsample.slerp(X, X.flip(0), [0.2, 0.7]),
    "invert": lambda: fastsample.ddim_invert(lambda x, t: 0.1 * x, X, steps=2),
    "to_uint8": lambda: torch.as_tensor(np.asarray(fastsample.to_uint8(X)), device="cpu"),
    "randn": lambda: ops.randn(SHAPE, seed=3, device="cpu"),
    "randn-out": lambda: ops.randn(SHAPE, seed=[1, 2], out=torch.empty(SHAPE, dtype=torch.float32, device="cpu")),
    "step": lambda: ops.step(X, MODEL_OUTPUT, DDIM(Schedule.linear(), steps=5, eta=1.0).table, 1, seed=3),
    "step-rows": lambda: ops.step(
        X, MODEL_OUTPUT, DDIM(Schedule.linear(), steps=5).table, torch.tensor([1, 2], device="cpu")
    ),
    "step-guided": lambda: ops.step(
        X,
        torch.cat([X, MODEL_OUTPUT]),
        DDIM(Schedule.linear(), steps=5).table,
        1,
        guidance=[2.0, 3.0],
        guidance_rescale=0.5,
    ),
    "batcher": lambda: batched(),
    "lora": lambda: attached(),
    "unet": lambda: UNET(X[..., :4], torch.tensor([3, 500], device="cpu")).detach(),
    "posterior": lambda: ops.posterior(X, torch.cat([MODEL_OUTPUT, MODEL_OUTPUT], dim=1), LEARNED, 1),
    "posterior-rows": lambda: ops.posterior(
        X, torch.cat([MODEL_OUTPUT, MODEL_OUTPUT], dim=1), LEARNED, torch.tensor([1, 2], device="cpu")
    ),
    "likelihood": lambda: ops.likelihood(X.clamp(-1, 1), X, torch.cat([MODEL_OUTPUT, MODEL_OUTPUT], dim=1), LEARNED, 1),
    "prior_bits": lambda: ops.prior_bits(X, LEARNED),
}


class Told(nn.Module):
    config = type("Config", (), {"time_cond_proj_dim": 8})

    def forward(self, x: Tensor, t: Tensor, timestep_cond: Tensor) -> Tensor:
        assert timestep_cond.dtype == torch.float32
        return 0.1 * x + timestep_cond.sum()


def batched() -> list[Tensor]:
    batcher = Batcher(
        lambda x, t, c, w: 0.1 * x * c.reshape(-1, 1, 1, 1) + w.reshape(-1, 1, 1, 1),
        DDIM(Schedule.linear(), steps=3, eta=1.0),
        batch=2,
        guidance=2.0,
        uncond={"c": 0.3, "w": 1},
    )
    requests = [batcher.submit(SHAPE[1:], seed=3, index=i, c=0.1 + i, w=i) for i in range(2)]
    return [request.result() for request in requests]


def attached() -> Any:
    layer = nn.Sequential(nn.Linear(4, 3, dtype=torch.float32, device="cpu"))
    layer.load_state_dict({"0.weight": torch.ones(3, 4, device="cpu"), "0.bias": torch.zeros(3, device="cpu")})
    lora.attach(layer, PAIR, name="one", scale=0.3)
    found = layer(COND.reshape(-1)[:4].clone()[None]).detach()
    return [found, lora.state_dict(layer, "one")]


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, default: Callable[[], Any]) -> None:
    same(FUNCTIONS[name], default)
