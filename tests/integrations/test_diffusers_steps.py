"""What a step of a drop-in scheduler takes and returns, beside diffusers' step."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fastsample
import fastsample.integrations.diffusers as ours

NAMES = [name for name in ours.__all__ if name.endswith("Scheduler")]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NOISY = ["DDIM", "DDPM", "LCM", "TCD", "CMStochasticIterative", "EulerAncestralDiscrete", "DPMSolverMultistep"]
NOISY_OPTIONS: dict[str, dict[str, Any]] = {
    "DPMSolverMultistep": {"algorithm_type": "sde-dpmsolver++"},
    "FlowMatchEulerDiscrete": {"stochastic_sampling": True},
}


def pair(name: str, steps: int = 5, **options: Any) -> tuple[Any, Any]:
    """diffusers' scheduler and the drop-in, with timesteps."""
    both = getattr(diffusers, name)(**options), getattr(ours, name)(**options)
    for scheduler in both:
        scheduler.set_timesteps(steps)
    return both


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen_by(scheduler: Any, x: Tensor, t: Any) -> Tensor:
    seen: Tensor = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    return seen


def with_generator(name: str, generator: Any) -> dict[str, Any]:
    return {"generator": generator} if "generator" in inspect.signature(getattr(ours, name).step).parameters else {}


def apart(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("output", DTYPES, ids=str)
def test_dtypes_are_those_of_diffusers(name: str, state: torch.dtype, output: torch.dtype) -> None:
    theirs, own = pair(name)
    x, m = drawn(2, 3, 5, 7).to(state), drawn(2, 3, 5, 7, seed=1).to(output)
    results = []
    for scheduler in (theirs, own):
        t = scheduler.timesteps[1]
        seen_by(scheduler, x, t)
        given = with_generator(name, torch.Generator().manual_seed(3))
        results.append(scheduler.step(m, t, x, **given, return_dict=False))
    for want, got in zip(*results, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        # What is in half precision there rounds each of its operations, here the result alone.
        rounding = max(torch.finfo(dtype).eps for dtype in (state, output, torch.float32))
        assert apart(got, want) <= 8 * rounding


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [int, torch.clone, lambda t: t.reshape(1)], ids=["number", "tensor", "one-in-a-list"])
def test_forms_of_a_timestep(name: str, kind: Any) -> None:
    _, own = pair(name)
    _, other = pair(name)
    x, m = drawn(2, 3, 5, 7), drawn(2, 3, 5, 7, seed=1)
    if own.timesteps.is_floating_point():
        kind = float if kind is int else kind
    for t, u in zip(own.timesteps, other.timesteps, strict=True):
        given = kind(t)
        if isinstance(given, Tensor) and given.ndim and name not in ("DDIMScheduler", "DDIMInverseScheduler"):
            given = given[0]
        seen_by(own, x, given), seen_by(other, x, u)
        got = own.step(m, given, x, **with_generator(name, torch.Generator().manual_seed(3))).prev_sample
        want = other.step(m, u, x, **with_generator(name, torch.Generator().manual_seed(3))).prev_sample
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", [f"{name}Scheduler" for name in NOISY])
@pytest.mark.parametrize("count", [1, 3], ids=["one", "one-per-sample"])
def test_lists_of_generators(name: str, count: int) -> None:
    options = NOISY_OPTIONS.get(name.removesuffix("Scheduler"), {})
    theirs, own = pair(name, **options)
    x, m = drawn(3, 3, 5, 7), drawn(3, 3, 5, 7, seed=1)
    extra = {"eta": 1.0} if name in ("DDIMScheduler", "TCDScheduler") else {}
    results = []
    for scheduler in (theirs, own):
        t = scheduler.timesteps[1]
        seen_by(scheduler, x, t)
        sources = [torch.Generator().manual_seed(seed) for seed in range(count)]
        out = scheduler.step(m, t, x, generator=sources, **extra).prev_sample
        results.append((out, [source.get_state() for source in sources]))
    (want, their_states), (got, states) = results
    assert apart(got, want) < 1e-6 and all(map(torch.equal, states, their_states))
    with pytest.raises(ValueError, match="generator"):
        own.step(m, own.timesteps[1], x, generator=[torch.Generator()] * 2, **extra)


@pytest.mark.parametrize("name", [f"{name}Scheduler" for name in [*NOISY, "FlowMatchEulerDiscrete"]])
def test_a_seed_is_the_noise_of_the_samplers(name: str) -> None:
    options = NOISY_OPTIONS.get(name.removesuffix("Scheduler"), {})
    theirs, own = pair(name, **options)
    eta = {"eta": 0.7} if name in ("DDIMScheduler", "TCDScheduler") else {}

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * torch.tanh(x)

    sampler = fastsample.from_diffusers(theirs, **eta)
    start = drawn(2, 3, 5, 7) * own.init_noise_sigma if hasattr(own, "init_noise_sigma") else drawn(2, 3, 5, 7)
    want = sampler(model, start, seed=7, index=[4, 2])
    x = start
    for t in own.timesteps:
        x = own.step(model(seen_by(own, x, t), t), t, x, seed=7, index=[4, 2], **eta).prev_sample
    # Five steps in float32, each of about eight roundings, of states that noise makes larger than the last.
    assert apart(x, want) < 5e-6
    alone = own_run(name, options, eta, model, start[1:], 2)
    assert torch.equal(alone, x[1:])


def own_run(name: str, options: Any, eta: Any, model: Any, x: Tensor, index: int) -> Tensor:
    own = getattr(ours, name)(**options)
    own.set_timesteps(5)
    for t in own.timesteps:
        x = own.step(model(seen_by(own, x, t), t), t, x, seed=7, index=index, **eta).prev_sample
    return x


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_diffusers(name: str) -> None:
    theirs, own = pair(name)
    x, m = drawn(2, 3, 5, 7), 0.5 * drawn(2, 3, 5, 7, seed=1)
    found = []
    for scheduler in (theirs, own):
        state, output = x.clone().requires_grad_(), m.clone().requires_grad_()
        t = scheduler.timesteps[1]
        seen_by(scheduler, state, t)
        given = with_generator(name, torch.Generator().manual_seed(3))
        scheduler.step(output, t, state, **given).prev_sample.square().sum().backward()
        found.append([gradient for gradient in (state.grad, output.grad) if gradient is not None])
    for want, got in zip(*found, strict=True):
        assert (got - want).abs().max() <= 1e-5 * max(float(want.abs().max()), 1e-3)


SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm-2": ("DPMSolverMultistepScheduler", {}),
    "dpm-3": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpm-of-epsilon": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "unipc-2": ("UniPCMultistepScheduler", {}),
    "unipc-3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "unipc-of-epsilon": ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    "unipc-partly-corrected": ("UniPCMultistepScheduler", {"disable_corrector": [1, 2]}),
    "euler": ("EulerDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
}


@pytest.mark.filterwarnings("ignore:.algorithm_types dpmsolver:FutureWarning")
@pytest.mark.parametrize("case", SOLVERS)
def test_states_that_somebody_changes_between_steps(case: str) -> None:
    """As pipelines do that paint a part anew."""
    name, options = SOLVERS[case]
    results = []
    for scheduler in pair(name, 6, **options):
        x = drawn(2, 3, 5, 7) * float(scheduler.init_noise_sigma)
        for k, t in enumerate(scheduler.timesteps):
            x = scheduler.step(0.5 * torch.tanh(seen_by(scheduler, x, t)), t, x).prev_sample
            x = torch.cat([x[:, :1], drawn(2, 2, 5, 7, seed=k)], 1)
        results.append(x[:, :1])
    want, got = results
    assert apart(got, want) < 5e-6


@pytest.mark.parametrize("case", SOLVERS)
@pytest.mark.filterwarnings("ignore:.algorithm_types dpmsolver:FutureWarning")
def test_a_run_that_begins_in_the_middle_and_another_after_it(case: str) -> None:
    """As image to image does: set_begin_index and a part of the timesteps."""
    name, options = SOLVERS[case]
    results = []
    for scheduler in pair(name, 6, **options):
        found = []
        for _ in range(2):
            scheduler.set_timesteps(6)
            rest = scheduler.timesteps[2:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(2)
            x = scheduler.add_noise(0.3 * drawn(2, 3, 5, 7), drawn(2, 3, 5, 7, seed=1), rest[:1].repeat(2))
            for t in rest:
                x = scheduler.step(0.5 * torch.tanh(seen_by(scheduler, x, t)), t, x).prev_sample
            found.append(x)
        assert torch.equal(*found)
        results.append(found[0])
    want, got = results
    assert apart(got, want) < 5e-6


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMInverseScheduler", "DDPMScheduler"])
def test_threads_share_a_scheduler(name: str) -> None:
    _, own = pair(name, 50)

    def run(seed: int) -> Tensor:
        x = drawn(1, 3, 5, 7, seed=seed)
        given = with_generator(name, torch.Generator().manual_seed(seed))
        for t in own.timesteps:
            x = own.step(0.5 * torch.tanh(x), t, x, **given).prev_sample
        return x

    want = [run(seed) for seed in range(8)]
    got: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda seed=seed: got.update({seed: run(seed)})) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[seed], one) for seed, one in enumerate(want))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "layout", [lambda x: x.mT.contiguous().mT, lambda x: x[::2], lambda x: x.to(memory_format=torch.channels_last)]
)
def test_layouts_and_operands_that_stay_as_they_are(name: str, layout: Any) -> None:
    _, own = pair(name)
    _, other = pair(name)
    x, m = (layout(drawn(4, 3, 5, 7, seed=seed)) for seed in range(2))
    kept = x.clone(), m.clone()
    given = [with_generator(name, torch.Generator().manual_seed(3)) for _ in range(2)]
    t, u = own.timesteps[1], other.timesteps[1]
    seen_by(own, x, t), seen_by(other, x, u)
    got = own.step(m, t, x, **given[0])
    want = other.step(m.contiguous(), u, x.contiguous(), **given[1])
    for name_, value in got.items():
        assert torch.equal(value, want[name_])
    assert torch.equal(x, kept[0]) and torch.equal(m, kept[1])


@pytest.mark.parametrize("name", NAMES)
def test_results_are_memory_of_their_own(name: str) -> None:
    """diffusers' tests write into what a step returned."""
    _, own = pair(name)
    x, m = drawn(2, 3, 5, 7), drawn(2, 3, 5, 7, seed=1)
    results = []
    for t in own.timesteps[:2]:
        seen_by(own, x, t)
        results.append(own.step(m, t, x, **with_generator(name, torch.Generator().manual_seed(3)), return_dict=False))
    kept = [one.clone() for one in results[0]]
    for tensor in results[1]:
        tensor.fill_(torch.nan)
    assert all(map(torch.equal, results[0], kept)) and not (x.isnan().any() or m.isnan().any())
