"""Steps of drop-in schedulers on a GPU, a pretended one where there is none: no step waits for it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample.integrations.diffusers as ours
from support.pretend_device import Device, Pretended, pretended

NAMES = [name for name in ours.__all__ if name.endswith("Scheduler")]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, {}) for name in NAMES},
    "DDIM of eta 1": ("DDIMScheduler", {}, {"eta": 1.0}),
    "DDPM of a learned variance": ("DDPMScheduler", {"variance_type": "learned_range"}, {}),
    "DPM with noise": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "DPM thresholded": ("DPMSolverMultistepScheduler", {"thresholding": True}, {}),
    "Euler with churn": ("EulerDiscreteScheduler", {}, {"s_churn": 3.0}),
    "flow with noise": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
}


def run(case: str, x: Tensor, device: Device | None = None) -> Tensor:
    name, options, given = CASES[case]
    scheduler = getattr(ours, name)(**options)
    scheduler.set_timesteps(5, device=x.device)
    if "seed" in inspect.signature(scheduler.step).parameters:
        given = {**given, "seed": 3}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = 0.5 * torch.tanh(seen)
        x = scheduler.step(torch.cat([m, m], 1) if "learned" in case else m, t, x, **given).prev_sample
        if device is not None:
            device.strict = True  # what is made once is made
    return x


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_the_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, case: str, kernels: bool) -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    if not kernels:
        monkeypatch.setattr("fastsample.ops.backend._override", "reference")
    want = run(case, x)
    for module in ("passes", "alpha_bars"):  # as the fixture does with ops
        monkeypatch.setattr(f"fastsample.integrations.diffusers.{module}.traced", lambda *tensors: False)
    with pretended(monkeypatch, kernels) as device:
        got = run(case, x.to("cuda"), device)
    assert isinstance(got, Pretended) and torch.equal(got.host, want)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: str) -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run(case, x.to("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (got.cpu() - run(case, x)).abs().max() <= 1e-5 * x.abs().max() * 20
