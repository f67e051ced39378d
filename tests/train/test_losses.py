"""What the hybrid loss takes: timesteps, dtypes, devices, transforms and compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import Schedule, add_noise, ops
from fastsample.ops import backend as backends
from fastsample.train import HybridLoss, losses
from support.pretend_device import Pretended, pretended
from support.whole_runs import moved

SCHEDULE = Schedule.cosine(20)
T = SCHEDULE.T
TIMES = torch.tensor([0, 3, T - 1])


def example(dtype: torch.dtype = torch.float32) -> tuple[HybridLoss, Tensor, Tensor, Tensor, Tensor]:
    """The loss, x0, noise, x_t and an output."""
    draw = torch.Generator().manual_seed(0)
    noise, output = (torch.randn((3, n, 4, 4), generator=draw).to(dtype) for n in (2, 4))
    x0 = (torch.randint(256, (3, 2, 4, 4), generator=draw) / 127.5 - 1).to(dtype)
    loss = HybridLoss(SCHEDULE)
    return loss, x0, noise, loss.q_sample(x0, TIMES, noise), output


@pytest.mark.parametrize("wrong", [-1, T, T + 5])
def test_timesteps_outside_the_schedule_are_named(wrong: int) -> None:
    loss, x0, noise, xt, output = example()
    t = torch.tensor([0, wrong, 1])
    for call in (
        lambda: loss.q_sample(x0, t, noise),
        lambda: loss.vlb_term(output, x0, xt, t),
        lambda: loss(output, x0, xt, t, noise),
    ):
        with pytest.raises(ValueError, match=rf"t must lie in \[0, 20\), got {wrong}$"):
            call()


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        (TIMES.double(), TypeError, "t must be a tensor of integers, got torch.float64"),
        (TIMES > 1, TypeError, "t must be a tensor of integers, got torch.bool"),
        (3, TypeError, "t must be a tensor, got int"),
        (TIMES[:, None], ValueError, r"t must have shape \(B,\) = \(3,\), got \(3, 1\)"),
    ],
    ids=["fractional", "mask", "number", "two-axes"],
)
def test_what_is_no_timestep(t: Any, error: type[Exception], message: str) -> None:
    loss, x0, noise, xt, output = example()
    with pytest.raises(error, match=message):
        loss.q_sample(x0, t, noise)
    with pytest.raises(error, match=message):
        loss.vlb_term(output, x0, xt, t)


def test_timesteps_of_any_integer_dtype() -> None:
    loss, x0, noise, xt, output = example()
    want = loss.vlb_term(output, x0, xt, TIMES)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(loss.q_sample(x0, TIMES.to(dtype), noise), xt)
        assert torch.equal(loss.vlb_term(output, x0, xt, TIMES.to(dtype)), want)


def test_one_timestep_for_all_samples() -> None:
    loss, x0, noise, xt, output = example()
    one, each = torch.tensor([7]), torch.full((3,), 7)
    assert torch.equal(loss.q_sample(x0, one, noise), loss.q_sample(x0, each, noise))
    assert torch.equal(loss.vlb_term(output, x0, xt, one), loss.vlb_term(output, x0, xt, each))


def test_an_output_without_a_variance_is_refused() -> None:
    loss, x0, noise, xt, _ = example()
    for call in (lambda: loss.vlb_term(noise, x0, xt, TIMES), lambda: loss(noise, x0, xt, TIMES, noise)):
        with pytest.raises(ValueError, match="output must have 4 channels in axis 1"):
            call()


def test_a_device_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"^device .* cannot be used"):
        HybridLoss(SCHEDULE, "nope")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_forward_process_and_the_bound_are_those_of_the_library(dtype: torch.dtype) -> None:
    loss, x0, noise, xt, output = example(dtype)
    torch.testing.assert_close(xt, add_noise(x0, TIMES, schedule=SCHEDULE, noise=noise), rtol=1e-6, atol=0)
    assert xt.dtype == dtype
    want = ops.likelihood(x0, xt, output, loss._table, T - 1 - TIMES, backend="reference")
    assert torch.equal(loss.vlb_term(output, x0, xt, TIMES), want)


def test_float64_anywhere_is_computed_in() -> None:
    loss, x0, noise, xt, output = example()
    assert loss.q_sample(x0, TIMES, noise.double()).dtype == torch.float64
    want = loss.vlb_term(output.double(), x0.double(), xt.double(), TIMES)
    for given in ((output.double(), x0, xt), (output, x0.double(), xt), (output, x0, xt.double())):
        assert torch.equal(loss.vlb_term(*given, TIMES), want)


@pytest.mark.parametrize("backend", ["triton", "cuda", "cpu"])
def test_the_backend_that_is_asked_for_elsewhere_does_not_matter(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    loss, x0, noise, xt, output = example()
    want = loss.vlb_term(output, x0, xt, TIMES)
    monkeypatch.setattr(backends, "_override", backend)
    mse, vb = loss(output.requires_grad_(), x0, loss.q_sample(x0, TIMES, noise), TIMES, noise)
    (mse + vb).sum().backward()
    assert output.grad is not None and output.grad.isfinite().all()
    assert torch.equal(vb.detach(), want * (T / 1000))


def test_the_host_does_not_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its coefficients are there from the first call on; a t out of range, which it cannot see, makes NaN."""
    loss, *given = example()
    x0, noise, xt, output = given
    want = (*loss(output, x0, xt, TIMES, noise), xt)
    kept: dict[tuple[Any, ...], Pretended] = {}
    for name in ("_levels", "coefficients_of"):
        make = getattr(losses, name)

        def uploaded(
            table: Any, dtype: torch.dtype, device: torch.device, name: str = name, make: Any = make
        ) -> Tensor:
            assert device.type == "cuda"
            return kept.setdefault((name, dtype), Pretended(make(table, dtype, torch.device("cpu"))))

        monkeypatch.setattr(losses, name, uploaded)
    # The pretended device is a mode, which makes everything look traced.
    monkeypatch.setattr(losses, "traced", lambda *tensors: False)
    with pretended(monkeypatch, False) as device:
        x0, noise, xt, output = (moved(one, "cuda") for one in given)
        t, late = moved(TIMES, "cuda"), moved(torch.tensor([-1, 3, T]), "cuda")
        with device.refusing():
            got = (*loss(output, x0, xt, t, noise), loss.q_sample(x0, t, noise))
            lost = loss.vlb_term(output, x0, xt, late)
    for one, other in zip(got, want, strict=True):
        assert isinstance(one, Pretended) and torch.equal(one.host, other)
    assert isinstance(lost, Pretended) and lost.host.isnan().tolist() == [True, False, True]


def test_transforms_and_compiled_code(compiler: Any) -> None:
    loss, x0, noise, _, output = example()

    def total(x0: Tensor, output: Tensor, t: Tensor) -> Tensor:
        mse, vb = loss(output, x0, loss.q_sample(x0, t, noise), t, noise)
        return (mse + vb).sum()

    inputs = (x0.requires_grad_(), output.requires_grad_())
    want = torch.autograd.grad(total(*inputs, TIMES), inputs)
    for one, other in zip(torch.func.grad(total, (0, 1))(x0.detach(), output.detach(), TIMES), want, strict=True):
        torch.testing.assert_close(one, other)
    compiled = torch.compile(total, fullgraph=True, backend=compiler)
    for t in (TIMES, TIMES.flip(0)):
        torch.testing.assert_close(compiled(*inputs, t), total(*inputs, t))
    assert compiler.frame_count == 1
    # Coefficients are constants of the code, which knows whose they are.
    q_sample = torch.compile(HybridLoss.q_sample, fullgraph=True, backend=compiler)
    for own in (loss, HybridLoss(Schedule.cosine(30))):
        assert torch.equal(q_sample(own, x0, TIMES, noise), own.q_sample(x0, TIMES, noise))
