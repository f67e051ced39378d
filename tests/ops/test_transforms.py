"""torch.func, forward-mode derivatives, vmap and recorders: the right values and derivatives, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp
from torch.fx.experimental.proxy_tensor import make_fx

import fastsample
from fastsample import DDIM, DDPM, IPNDM, DPMSolver, Schedule, Table
from fastsample.ops import likelihood, posterior, randn, step

SHAPE = (2, 3, 4)
SCHEDULE = Schedule.linear(100)
TABLE = Table([9, 4, 0], p=0.9, q=-0.4, a=0.3, b=0.6, c1=[0, 0.2, 0.2], d=0.25, s=0.5, limit=2.0)


def drawn(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(SHAPE, generator=generator) for name in names}


T = drawn("x", "m", "u", "h", "tangent")


def stepped(x: Tensor, m: Tensor, h: Tensor, w: Tensor) -> Tensor:
    return step(x, torch.cat([T["u"], m]), TABLE, 1, seed=3, guidance=w, guidance_rescale=0.5, history=[h])


WEIGHT = torch.tensor(2.0)
OPERANDS = {"x": T["x"], "m": T["m"], "h": T["h"], "w": WEIGHT}


def directional(function: Callable[[Tensor], Tensor], at: Tensor, tangent: Tensor) -> Tensor:
    """The derivative by central differences in float64: the samplers' float32 would leave no digits."""
    h = 1e-3
    return (function(at + h * tangent).double() - function(at - h * tangent).double()) / (2 * h)


@pytest.mark.parametrize("name", OPERANDS)
def test_jvp_of_a_step(name: str) -> None:
    at = OPERANDS[name]
    tangent = T["tangent"] if at.ndim else torch.tensor(1.0)

    def along(one: Tensor) -> Tensor:
        return stepped(**{**OPERANDS, name: one})

    value, derivative = jvp(along, (at,), (tangent,))
    torch.testing.assert_close(value, along(at))
    # The clamp's corners are a thousandth of the elements at most; the rest is smooth.
    torch.testing.assert_close(derivative.double(), directional(along, at, tangent), atol=2e-3, rtol=2e-3)
    with forward_ad.dual_level():
        dual = along(forward_ad.make_dual(at, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, derivative)
    _, pull = vjp(along, at)
    cotangent = T["u"]
    torch.testing.assert_close(
        (pull(cotangent)[0] * tangent).sum(), (cotangent * derivative).sum(), atol=1e-4, rtol=1e-4
    )


NET = torch.nn.Conv1d(3, 3, 3, padding=1)
with torch.no_grad():
    for parameter in NET.parameters():
        parameter.copy_(torch.linspace(-0.2, 0.3, parameter.numel()).view_as(parameter))
PARAMETERS = {name: one.detach() for name, one in NET.named_parameters()}
SAMPLERS = {
    "ddim": DDIM(SCHEDULE, steps=3, eta=0.5),
    "ddpm": DDPM(SCHEDULE, steps=3),
    "dpm_solver": DPMSolver(SCHEDULE, steps=4, order=2),
    "ipndm": IPNDM(SCHEDULE, steps=5, clip=5.0),
}
samplers = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def sampled(sampler: Any, parameters: dict[str, Tensor], **options: Any) -> Tensor:
    return sampler(lambda x, t: functional_call(NET, parameters, (x,)), SHAPE, seed=1, **options)


def shifted(by: float) -> dict[str, Tensor]:
    return {name: one + by for name, one in PARAMETERS.items()}


@samplers
def test_derivatives_of_a_run_in_the_models_parameters(sampler: Any) -> None:
    def run(parameters: dict[str, Tensor]) -> Tensor:
        return sampled(sampler, parameters)

    ones = {name: torch.ones_like(one) for name, one in PARAMETERS.items()}
    value, derivative = jvp(run, (PARAMETERS,), (ones,))
    torch.testing.assert_close(value, run(PARAMETERS))
    # Of third order at most in a shift of all parameters by h: the difference is off by h^2 of the value's size, and by
    # float32's rounding over h.
    difference = directional(lambda by: run(shifted(float(by))), torch.tensor(0.0), torch.tensor(1.0))
    torch.testing.assert_close(derivative.double(), difference, atol=2e-3, rtol=2e-3)
    assert derivative.abs().max() > 0.1
    gradient = grad(lambda parameters: run(parameters).sum())(PARAMETERS)
    torch.testing.assert_close(sum(one.sum() for one in gradient.values()), derivative.sum(), atol=1e-4, rtol=1e-4)
    for jacobian in (jacrev(run)(PARAMETERS), jacfwd(run)(PARAMETERS)):
        summed = sum(one.flatten(3).sum(-1) for one in jacobian.values())
        torch.testing.assert_close(summed, derivative, atol=1e-4, rtol=1e-4)


@samplers
def test_vmap_of_a_run_is_a_loop(sampler: Any) -> None:
    each = [shifted(by) for by in (0.0, 0.1)]
    together = {name: torch.stack([one[name] for one in each]) for name in PARAMETERS}
    got = torch.vmap(lambda parameters: sampled(sampler, parameters))(together)
    torch.testing.assert_close(got, torch.stack([sampled(sampler, one) for one in each]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
@samplers
def test_a_recorded_run_has_eagers_bits(sampler: Any, tracing: Any) -> None:
    recorded = make_fx(lambda parameters: sampled(sampler, parameters), tracing_mode=tracing)(PARAMETERS)
    for parameters in (PARAMETERS, shifted(0.1)):
        assert torch.equal(recorded(parameters), sampled(sampler, parameters))


def test_a_recorded_run_under_guidance() -> None:
    options: dict[str, Any] = {"guidance": 2.0, "guidance_rescale": 0.5, "cond": {}, "uncond": {}}
    run = lambda parameters: sampled(SAMPLERS["ddim"], parameters, **options)  # noqa: E731
    assert torch.equal(make_fx(run)(PARAMETERS)(PARAMETERS), run(PARAMETERS))


def test_a_traced_run() -> None:
    def run(x: Tensor) -> Tensor:
        return SAMPLERS["ddim"](lambda a, t: 0.1 * a, x, seed=1)

    with pytest.warns((torch.jit.TracerWarning, DeprecationWarning)):
        traced = torch.jit.trace(run, torch.zeros(SHAPE), check_trace=False)
    torch.testing.assert_close(traced(T["x"]), run(T["x"]))


def test_a_fake_run_has_the_shape_of_a_sample() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net = torch.nn.Conv1d(3, 3, 3, padding=1)
        sample = fastsample.ddim(lambda x, t: net(x), SHAPE, steps=2, schedule=SCHEDULE)
    assert sample.shape == SHAPE and sample.dtype == torch.float32


def test_a_mode_that_counts_sees_the_model_and_no_gradients() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        sample = SAMPLERS["ddim"](lambda x, t: NET(x), SHAPE, seed=1)
    assert torch.equal(sample, sampled(SAMPLERS["ddim"], PARAMETERS)) and not sample.requires_grad
    assert counter.get_total_flops() == 3 * 2 * (2 * 4) * 3 * 3 * 3


PLAIN = Table([9, 4, 0], p=0.9, q=-0.4, a=0.3, b=0.6, d=0.25, s=0.5)
NORMALS = Table([4, 0], p=0.9, q=-0.4, a=0.3, b=0.6, s=0.5)
VMAPPED: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "x": (lambda x: step(x, 0.1 * x, PLAIN, 1, seed=3), torch.stack([T["x"], T["m"]])),
    "m": (lambda m: step(T["x"], m, PLAIN, 1, seed=3), torch.stack([T["x"], T["m"]])),
    "noise": (lambda z: step(T["x"], T["m"], PLAIN, 1, noise=z), torch.stack([T["x"], T["m"]])),
    "guidance": (
        lambda w: step(T["x"], torch.cat([T["u"], T["m"]]), PLAIN, 1, seed=3, guidance=w),
        torch.tensor([1.0, 4.0]),
    ),
    "seed": (lambda seed: step(T["x"], T["m"], PLAIN, 1, seed=seed), torch.tensor([1, 2])),
    "out": (lambda out: step(T["x"], T["m"], PLAIN, 1, seed=3, out=out), torch.stack([T["x"], T["m"]])),
    "posterior": (lambda m: posterior(T["x"], m, NORMALS, 0)[0], torch.stack([T["x"], T["m"]])),
    "likelihood": (
        lambda m: likelihood(T["x"], T["u"], m, DDPM(SCHEDULE).table, 50),
        torch.stack([T["x"], T["m"]]),
    ),
    "randn": (lambda seed: randn(SHAPE, seed=seed), torch.tensor([1, 2])),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_of_an_op_is_a_loop(name: str) -> None:
    function, batched = VMAPPED[name]
    got = torch.vmap(function)(batched.clone())
    torch.testing.assert_close(got, torch.stack([function(one) for one in batched.clone()]))


@pytest.mark.parametrize("name", ["x", "m", "noise", "out", "posterior", "randn"])
def test_functionalized_ops(name: str) -> None:
    function, batched = VMAPPED[name]
    got = torch.func.functionalize(function)(batched[0].clone())
    torch.testing.assert_close(got, function(batched[0].clone()))


def test_a_row_under_vmap_is_refused() -> None:
    with pytest.raises(TypeError, match="row"):
        torch.vmap(lambda row: step(T["x"], T["m"], PLAIN, row, seed=3))(torch.tensor([[0, 1], [1, 1]]))


@pytest.mark.parametrize("name", ["posterior", "likelihood"])
def test_jvp_of_other_ops(name: str) -> None:
    function, _ = VMAPPED[name]
    _, derivative = jvp(function, (T["m"],), (T["tangent"],))
    difference = directional(function, T["m"], T["tangent"])
    torch.testing.assert_close(derivative.double(), difference, atol=2e-3, rtol=2e-3)


def test_without_operands_that_are_followed_kernels_run() -> None:
    want = step(T["x"], T["m"], PLAIN, 1, seed=3)
    with forward_ad.dual_level():
        assert torch.equal(step(T["x"], T["m"], PLAIN, 1, seed=3, backend="cpu"), want)
    value, derivative = jvp(lambda x: x + step(T["x"], T["m"], PLAIN, 1, seed=3), (T["x"],), (T["tangent"],))
    assert torch.equal(value, T["x"] + want) and torch.equal(derivative, T["tangent"])


def test_an_explicit_backend_that_has_no_derivatives() -> None:
    with pytest.raises(ValueError, match="backend='cpu'"):
        jvp(lambda x: step(x, T["m"], PLAIN, 1, seed=3, backend="cpu"), (T["x"],), (T["tangent"],))
