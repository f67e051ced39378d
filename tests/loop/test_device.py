"""Loops on a device: no host synchronisation, no upload and no mix of devices between rows, and the CPU's bits.

Without a GPU a pretended one (pretend_device.py) runs whole samplers and refuses what would make a GPU wait; Triton's
kernels run whole samplers in their interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import DDIM, DDPM, Batcher, DPMSolver, DynamicThreshold, Euler, Heun, Sampler, backends, ddim
from support.pretend_device import Device, HostSyncError, Pretended, pretended
from support.whole_runs import (
    COND,
    HALF,
    PAINTED,
    RUNS,
    SCHEDULE,
    SHAPE,
    UNCOND,
    learned,
    model,
    moved,
    never,
    nudge,
)

KERNELS = [pytest.param(True, id="kernels"), pytest.param(False, id="reference")]


def watched(device: Device, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A model from whose first call on the device refuses syncs."""

    def call(x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        device.strict = True
        assert x.device.type == t.device.type == "cuda"
        return inner(x, t, **keywords)

    return call


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("observed", [False, True], ids=["", "callback"])
@pytest.mark.parametrize("name", RUNS)
def test_rows_make_nobody_wait_and_have_the_bits_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, name: str, observed: bool, kernels: bool
) -> None:
    make, options, inner, x = RUNS[name]
    sampler = make()
    also: dict[str, Any] = {"callback": nudge} if observed else {}
    want = sampler(inner, x, backend="cpu" if kernels else "reference", **options, **also)
    with pretended(monkeypatch, kernels) as device:
        start, given = moved(x, "cuda"), moved(options, "cuda")
        got = sampler(watched(device, inner), start, device="cuda", **given, **also)
    assert isinstance(got, Pretended)
    assert torch.equal(got.host, want)


def test_an_iterator_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = DPMSolver(SCHEDULE, steps=4, clip=1.0)
    want = [(step.x.clone(), step.x0.clone()) for step in sampler.iterate(model, SHAPE, seed=0)]
    with pretended(monkeypatch, True) as device:
        steps = sampler.iterate(watched(device, model), SHAPE, seed=0, device="cuda")
        got = [(step.x.clone(), step.x0.clone()) for step in steps]
    for (x, x0), (want_x, want_x0) in zip(got, want, strict=True):
        assert torch.equal(x.host, want_x) and torch.equal(x0.host, want_x0)


def test_seeds_on_the_device_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """They say cuda:0, the caller cuda."""
    seeds, sampler = torch.tensor([5, -3]), DDIM(SCHEDULE, steps=3, eta=1.0)
    want = sampler(model, SHAPE, seed=seeds)
    with pretended(monkeypatch, True) as device:
        there = seeds.to("cuda")
        with device.refusing():
            got = sampler(model, SHAPE, seed=there, device="cuda")
    assert torch.equal(got.host, want)


SYNCS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0, 0, 0, 0].item(),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "upload": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "upload-of-a-number": lambda x: torch.tensor(1.0).to(x.device),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "cpu-index": lambda x: x[torch.tensor([0])],
    "two-devices": lambda x: x + torch.ones(5),
    "copy-from-cpu": lambda x: x.clone().copy_(torch.zeros(SHAPE)),
}


@pytest.mark.parametrize("name", SYNCS)
def test_the_pretended_device_refuses(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The tests above would pass on a device that minds nothing."""

    def waits(x: Tensor, t: Tensor) -> Tensor:
        SYNCS[name](x)
        return x

    with pretended(monkeypatch, True) as device, pytest.raises(HostSyncError):
        DDIM(SCHEDULE, steps=3)(watched(device, waits), SHAPE, device="cuda")


BATCHED: dict[str, tuple[Callable[[], Sampler], Callable[..., Tensor], dict[str, Any]]] = {
    "ddim-noise": (lambda: DDIM(SCHEDULE, steps=3, eta=1.0), model, {}),
    "threshold": (lambda: DDIM(SCHEDULE, steps=3, clip=DynamicThreshold(0.9)), model, {}),
    "learned-half": (lambda: DDPM(SCHEDULE, steps=3, variance="learned_range", clip=1.0), learned, HALF),
    "dpm-solver-3": (lambda: DPMSolver(SCHEDULE, steps=5, order=3), model, {}),
    "heun": (lambda: Heun(SCHEDULE, steps=2), model, {}),
    "scaled-half": (lambda: Euler(SCHEDULE, steps=3), model, HALF),
    "guided": (
        lambda: DDIM(SCHEDULE, steps=3, eta=0.5),
        model,
        {"guidance": 3.0, "uncond": {"c": UNCOND[0]}, "guidance_rescale": 0.3},
    ),
}


def staggered(batcher: Batcher, device: str) -> list[Tensor]:
    """The results of five requests that join, two calls apart, a batch of two."""
    c, requests = COND.to(device), []
    for seed in range(5):
        requests.append(batcher.submit(SHAPE[1:], seed=7 * seed, c=c[seed % 2]))
        batcher.step()
        batcher.step()
    return [request.result() for request in requests]


@pytest.mark.parametrize("name", BATCHED)
def test_a_batcher_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make, inner, options = BATCHED[name]
    want = staggered(Batcher(inner, make(), batch=2, **options), "cpu")
    with pretended(monkeypatch, True) as device:
        module = torch.nn.Module()
        module.forward = watched(device, inner)
        module.here = torch.nn.Parameter(torch.zeros(1, device="cuda", requires_grad=False), requires_grad=False)
        got = staggered(Batcher(module, make(), batch=2, **moved(options, "cuda")), "cuda")
    assert all(torch.equal(one.host, other) for one, other in zip(got, want, strict=True))


def test_numbers_join_a_batcher_without_an_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    want = [Batcher(model, DDIM(SCHEDULE, steps=2), batch=1).submit(SHAPE[1:], seed=3).result()]
    with pretended(monkeypatch, True) as device:
        module = torch.nn.Module()
        module.forward = watched(device, lambda x, t, w: model(x, t))
        module.here = torch.nn.Parameter(torch.zeros(1, device="cuda"), requires_grad=False)
        batcher = Batcher(module, DDIM(SCHEDULE, steps=2), batch=1)
        got = [batcher.submit(SHAPE[1:], seed=3, w=weight).result() for weight in (1, 2)]
    assert torch.equal(got[0].host, want[0]) and torch.equal(got[1].host, want[0])


# Interpreted kernels are slow, so a few runs that are unlike one another.
INTERPRETED = (
    *("ddim", "ddim-noise", "ddim-clip", "ddim-threshold", "half", "ddpm-learned", "dpm-solver-3", "heun"),
    *("euler-scaled-half-guided", "lcm", "guided-rescaled", "guided-at-times", "inpainting", "correct-x0", "strength"),
)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", INTERPRETED)
def test_whole_samplers_through_gpu_kernels_have_the_bits_of_the_cpu(
    request: pytest.FixtureRequest, name: str, backend: str
) -> None:
    make, options, inner, x = RUNS[name]
    device = "cuda" if torch.cuda.is_available() and backends()[backend]["available"] else "cpu"
    if device == "cpu" and backend == "cuda":
        request.getfixturevalue("cuda_on_cpu")
    elif backend == "triton":
        pytest.importorskip("triton")
    want = make()(inner, x, backend="cpu", **options)
    got = make()(inner, moved(x, device), backend=backend, device=device, **moved(options, device))
    if device == "cpu":
        assert torch.equal(got, want)
    else:  # torch's own sums of products, in inpainting for one, are rounded once on a GPU and twice on a CPU
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


def test_a_batcher_through_triton_has_the_bits_of_the_cpu() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter's test: TRITON_INTERPRET is not set beside a GPU")
    want = staggered(Batcher(model, DDIM(SCHEDULE, steps=2, eta=1.0), batch=2, backend="cpu"), "cpu")
    got = staggered(Batcher(model, DDIM(SCHEDULE, steps=2, eta=1.0), batch=2, backend="triton"), "cpu")
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_rows_make_a_gpu_wait_for_nothing(name: str) -> None:
    make, options, inner, x = RUNS[name]
    start, given, sampler = moved(x, "cuda"), moved(options, "cuda"), make()
    sampler(inner, start, device="cuda", **given)  # kernels are compiled at first use

    def call(x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        return inner(x, t, **keywords)

    try:
        got = sampler(call, start, device="cuda", **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), sampler(inner, x, **options), rtol=1e-4, atol=1e-4)


def test_what_is_known_may_lie_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is uploaded before rows run."""
    sampler = DDIM(SCHEDULE, steps=3, eta=1.0)
    want = sampler(model, SHAPE, seed=0, **PAINTED)
    with pretended(monkeypatch, True) as device:
        got = sampler(watched(device, model), SHAPE, seed=0, device="cuda", **PAINTED)
    assert torch.equal(got.host, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_on_a_device_are_read_before_rows_run(monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    with pretended(monkeypatch, True), pytest.raises(ValueError, match="guidance must be finite"):
        DDIM(SCHEDULE, steps=3)(model, SHAPE, device="cuda", guidance=torch.tensor([1.0, bad]).to("cuda"), uncond={})


@pytest.mark.parametrize(
    ("device", "error"),
    [([1], TypeError), (True, TypeError), (1.5, TypeError), ("gpu", ValueError), ("cuda:x", ValueError)],
    ids=repr,
)
def test_what_is_no_device_is_refused_by_name(device: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^device (must be|.* cannot be used)"):
        ddim(never, (1, 3), steps=2, device=device)
