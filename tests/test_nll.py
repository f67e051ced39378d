"""Bits per dimension: published values, a bound known in closed form, any shape and variance, and what is refused."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastsample import DDPM, DynamicThreshold, Schedule, nll
from fastsample.ops import likelihood, prior_bits, randn
from support.chains import CHAINS, golden_noise, learned_model, toy_model
from support.gaussian import Epsilon, entropy, expected_bound, levels
from support.golden import golden

LINEAR, COSINE = Schedule.linear(), Schedule.cosine()
UNIT = 2.0**-24  # of rounding in float32
X0 = levels((3, 2, 4, 5))


def called(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    raise AssertionError("the model is not called")


def noise_of(k: int) -> Tensor:
    return randn(X0.shape, seed=9, step=k)


@pytest.mark.parametrize("form", ["function", "iterator", "tensor"])
@pytest.mark.parametrize(("name", "timesteps", "seed"), CHAINS)
def test_published_bits(name: str, timesteps: str, seed: int, form: str) -> None:
    """The published code sums log ratio + ratio - 1 in float32, and takes epsilon from x - x0 before z from that."""
    data = golden(name)
    x0, steps = torch.from_numpy(data["x0_8bit"]), len(data["timesteps"])

    def draw(k: int) -> Tensor:
        return golden_noise(seed, 701 + k, x0.shape)

    drawn = map(draw, range(steps))
    noise = draw if form == "function" else drawn if form == "iterator" else torch.stack(list(drawn))
    schedule = Schedule.from_betas(data["betas"])
    bits = nll(learned_model, x0, schedule=schedule, timesteps=timesteps, variance="learned_range", noise=noise)
    np.testing.assert_allclose(bits.total_bpd, data["bpd_total_bpd"], rtol=1e-6)
    np.testing.assert_allclose(bits.prior_bpd, data["bpd_prior_bpd"], rtol=1e-5, atol=UNIT)
    np.testing.assert_allclose(bits.vb, data["bpd_vb"], rtol=1e-5, atol=UNIT)
    np.testing.assert_allclose(bits.x0_mse, data["bpd_xstart_mse"], rtol=1e-5)
    # epsilon is rounded to some units of 4, or of 1 / sigma, and counts twice its difference from z.
    largest = np.maximum(4, 1 / np.sqrt(1 - data["alphas_cumprod"][::-1]))
    absolute = 4 * UNIT * largest * np.sqrt(data["bpd_mse"])
    assert (np.abs(bits.mse.numpy() - data["bpd_mse"]) <= 1e-5 * data["bpd_mse"] + absolute).all()
    assert bits.timesteps.tolist() == data["timesteps"][::-1].tolist()


GAUSSIANS = [
    *((name, steps, "fixed_large", None) for name in ("linear", "cosine") for steps in (4, 16, 64, 256)),
    *((name, 64, "fixed_small", None) for name in ("linear", "cosine")),
    *((name, steps, "learned_range", v) for name in ("linear", "cosine") for steps, v in ((16, 0.5), (64, 1.0))),
    ("linear", 16, "learned", -4.0),
]


@pytest.mark.filterwarnings("ignore:the row at t")
@pytest.mark.parametrize(("name", "steps", "variance", "v"), GAUSSIANS)
def test_the_mean_is_the_bound_in_closed_form(name: str, steps: int, variance: str, v: float | None) -> None:
    """Of 1e5 scalars, within four standard errors; clipping would bend what is linear."""
    schedule = {"linear": LINEAR, "cosine": COSINE}[name]
    model, x0 = Epsilon(schedule, v), levels((1000, 100))
    total = nll(model, x0, steps=steps, variance=variance, clip=None, seed=3).total_bpd.double()
    want = expected_bound(schedule, steps, variance, v or 0.0)
    assert abs(float(total.mean()) - want) <= 4 * float(total.std()) / math.sqrt(len(total))


@pytest.mark.filterwarnings("ignore:the row at t")
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_the_bound_falls_towards_the_entropy(schedule: Schedule) -> None:
    """With v = 1, the large variance down to the data. At 1000 steps 0.009 bits are left, by quadrature."""
    closed = [expected_bound(schedule, steps, "learned_range", 1.0) for steps in (4, 16, 64, 256, 1000)]
    assert closed == sorted(closed, reverse=True) and entropy() < closed[-1] < entropy() + 0.01
    model, x0 = Epsilon(schedule, 1.0), levels((500, 100))
    means = [
        float(nll(model, x0, steps=n, variance="learned_range", clip=None, seed=0).total_bpd.mean())
        for n in (4, 16, 64)
    ]
    assert means == sorted(means, reverse=True)


SHAPES = {"(B,)": (3,), "(B, D)": (3, 7), "(B, C, L)": (3, 2, 9), "(B, C, H, W)": (3, 2, 4, 5), "one": (1, 1, 3, 3)}


PROCESSES = [
    (shape, variance)
    for shape in SHAPES
    for variance in ("fixed_small", "fixed_large", "learned", "learned_range")
    if len(SHAPES[shape]) > 1 or variance.startswith("fixed")  # a learned one has an axis of its own
]


@pytest.mark.filterwarnings("ignore:the row at t")
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize(("shape", "variance"), PROCESSES)
def test_it_is_the_loop_over_the_terms(shape: str, variance: str, prediction: str) -> None:
    """Rounding: x0 is near 1 in float32 before the data are taken from it, as in the tests of the terms."""
    x0, learned = levels(SHAPES[shape]), variance.startswith("learned")
    arguments: dict[str, Any] = dict(timesteps="4,3,2", variance=variance, prediction=prediction)
    model = learned_model if learned else toy_model
    bits = nll(model, x0, schedule=COSINE, seed=5, index=2, **arguments)
    table = DDPM(COSINE, clip=1.0, **arguments).table
    assert table.alpha is not None and table.sigma is not None
    terms, errors = [], []
    for k, t in enumerate(table.times):
        z = randn(x0.shape, seed=5, index=2, step=k, stream=3).double()
        x = float(table.alpha[k]) * x0.double() + float(table.sigma[k]) * z
        m = model(x, torch.full((len(x),), t))
        terms.append(likelihood(x0.double(), x, m, table, k))
        half = m[:, : x.shape[1]] if learned else m
        guess = (float(table.p[k]) * x + float(table.q[k]) * half).clamp(-1, 1)
        errors.append((guess - x0).square().reshape(len(x), -1).mean(dim=1))
    vb, x0_mse = torch.stack(terms, dim=1), torch.stack(errors, dim=1)
    torch.testing.assert_close(bits.vb.double(), vb, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bits.x0_mse.double(), x0_mse, rtol=1e-5, atol=1e-9)
    ratio = torch.from_numpy((table.alpha[:-1] / table.sigma[:-1]) ** 2)
    torch.testing.assert_close(bits.mse.double(), x0_mse * ratio, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(bits.prior_bpd, prior_bits(x0, table), rtol=0, atol=0)
    torch.testing.assert_close(bits.total_bpd, bits.vb.sum(dim=1) + bits.prior_bpd, rtol=1e-6, atol=0)
    assert bits.timesteps.tolist() == list(table.times) and len(bits.vb) == len(x0)


@pytest.mark.parametrize("steps", [1, 2])
def test_processes_of_a_step_or_two(steps: int) -> None:
    bits = nll(learned_model, X0, schedule=LINEAR, steps=steps, variance="learned_range", seed=0)
    assert bits.vb.shape == (3, steps) and bits.total_bpd.isfinite().all() and (bits.total_bpd > 0).all()


@pytest.mark.parametrize("cut", [1, 2])
def test_a_seed_does_not_depend_on_the_batch(cut: int) -> None:
    whole = nll(toy_model, X0, schedule=LINEAR, steps=6, seed=4, index=10)
    for part, first in ((slice(0, cut), 10), (slice(cut, 3), 10 + cut)):
        bits = nll(toy_model, X0[part], schedule=LINEAR, steps=6, seed=4, index=first)
        torch.testing.assert_close(bits.vb, whole.vb[part], rtol=1e-6, atol=UNIT)  # sums in another order
    places = nll(toy_model, X0.flip(0), schedule=LINEAR, steps=6, seed=4, index=[12, 11, 10])
    torch.testing.assert_close(places.vb.flip(0), whole.vb, rtol=1e-6, atol=UNIT)


def test_every_step_and_seed_has_noise_of_its_own() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.clone())
        return x

    for seed in (0, 1):
        nll(model, torch.zeros(2, 50), schedule=LINEAR, steps=3, seed=seed)
    z = torch.stack(seen).flatten(1)
    z = z / z.std(dim=1, keepdim=True)
    assert (torch.corrcoef(z) - torch.eye(6)).abs().max() < 0.5  # five deviations of 100 pairs


def test_without_a_seed_torch_governs() -> None:
    def total() -> Tensor:
        return nll(toy_model, X0, schedule=LINEAR, steps=3).total_bpd

    torch.manual_seed(1)
    first, second = total(), total()
    torch.manual_seed(1)
    assert torch.equal(total(), first) and not torch.equal(first, second)


@pytest.mark.parametrize("noise", [noise_of, [noise_of(k) for k in range(4)], iter([noise_of(k) for k in range(4)])])
def test_given_noise_takes_the_place_of_a_seed(noise: Any) -> None:
    want = nll(toy_model, X0, schedule=LINEAR, steps=4, noise=torch.stack([noise_of(k) for k in range(4)]))
    got = nll(toy_model, X0, schedule=LINEAR, steps=4, noise=noise)
    assert torch.equal(got.vb, want.vb)


def test_a_generator_is_drawn_from_step_by_step() -> None:
    draw = torch.Generator().manual_seed(3)
    want = [torch.randn(X0.shape, generator=draw) for _ in range(4)]
    got = nll(toy_model, X0, schedule=LINEAR, steps=4, noise=torch.Generator().manual_seed(3))
    assert torch.equal(got.vb, nll(toy_model, X0, schedule=LINEAR, steps=4, noise=want).vb)


def test_one_call_a_step_and_no_memory_that_grows() -> None:
    times, places, alive = [], set(), weakref.WeakSet[Tensor]()

    def model(x: Tensor, t: Tensor) -> Tensor:
        times.append(t.tolist())
        places.add(x.data_ptr())
        assert len(alive) <= 2  # this step's noise, and the one before it
        return x

    def drawn() -> Iterator[Tensor]:
        for k in range(8):
            z = noise_of(k)
            alive.add(z)
            yield z

    bits = nll(model, X0, schedule=LINEAR, steps=8, noise=drawn())
    assert times == [[t] * 3 for t in bits.timesteps.tolist()] and len(places) == 1


@pytest.mark.parametrize("given", [None, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, given: torch.dtype | None) -> None:
    """A model gets the dtype that is asked for, the terms have that of the data."""
    seen = set()

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return toy_model(x, t)

    bits = nll(model, X0.to(dtype), schedule=LINEAR, steps=5, seed=0, model_dtype=given)
    assert seen == {given or torch.float32} and bits.vb.dtype == bits.total_bpd.dtype == bits.mse.dtype == dtype
    exact = nll(toy_model, X0.double(), schedule=LINEAR, steps=5, seed=0, model_dtype=torch.float64)
    # Half precision's 11 bits of epsilon are squared in errors of order 1.
    torch.testing.assert_close(bits.vb.double(), exact.vb, rtol=2e-2 if given is torch.float16 else 1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["model_kwargs", "cond"])
def test_labels(name: str) -> None:
    def model(x: Tensor, t: Tensor, *, y: Tensor, scale: Tensor) -> Tensor:
        assert y.dtype == torch.int64 and scale.dtype == x.dtype
        return x * scale + y.view(-1, 1, 1, 1)

    y = torch.tensor([0, 1, 2])
    keywords: dict[str, Any] = {name: {"y": y, "scale": torch.tensor(0.5, dtype=torch.float64)}}
    bits = nll(model, X0, schedule=LINEAR, steps=3, seed=0, model_dtype=torch.float32, **keywords)
    alone = nll(lambda x, t: 0.5 * x + 2, X0[2:], schedule=LINEAR, steps=3, seed=0, index=2)
    torch.testing.assert_close(bits.vb[2:], alone.vb, rtol=1e-6, atol=UNIT)


class Layer(nn.Module):
    """A torch module with a schedule, whose parameters require gradients."""

    schedule = COSINE

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_module_in_every_mode(mode: Callable[[], Any]) -> None:
    model = Layer().eval()
    with mode():
        bits = nll(model, X0, steps=3, seed=0)
    assert not bits.total_bpd.requires_grad
    torch.testing.assert_close(bits.vb, nll(model, X0, steps=3, seed=0, schedule=COSINE).vb, rtol=0, atol=0)


def test_strided_data_and_what_is_given_stays_as_it_is() -> None:
    strided = X0.transpose(2, 3).contiguous().transpose(2, 3)
    before = strided.clone()
    assert torch.equal(
        nll(toy_model, strided, schedule=LINEAR, steps=3, seed=0).vb,
        nll(toy_model, X0, schedule=LINEAR, steps=3, seed=0).vb,
    )
    assert torch.equal(strided, before)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    nll(toy_model, X0, schedule=LINEAR, steps=7, seed=0, progress=True)
    assert "7/7" in capsys.readouterr().err


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no-tensor": (TypeError, "x0 must be a floating-point tensor, got list", {"x0": [[0.0]]}),
    "bytes": (TypeError, "x0 must be a floating-point tensor, got torch.uint8", {"x0": torch.zeros(2, 3).byte()}),
    "half": (TypeError, "x0 must be float32", {"x0": torch.zeros(2, 3).half()}),
    "empty": (ValueError, "x0 must have a first axis", {"x0": torch.zeros(0, 3)}),
    "scalar": (ValueError, "x0 must have a first axis", {"x0": torch.tensor(0.5)}),
    "sparse": (TypeError, "x0 must be a dense tensor", {"x0": torch.zeros(2, 3).to_sparse()}),
    "nan": (ValueError, r"x0 must lie in \[-1, 1\].*got nan", {"x0": torch.tensor([[0.0, math.nan]])}),
    "beyond": (ValueError, r"x0 must lie in \[-1, 1\].*got -1 to 1.5", {"x0": torch.tensor([[-1.0, 1.5]])}),
    "0-255": (ValueError, r"got 0 to 255: images are x / 127.5 - 1", {"x0": torch.tensor([[0.0, 255.0]])}),
    "gradients": (ValueError, r"x0 requires gradients.*x0.detach\(\)", {"x0": X0.clone().requires_grad_()}),
    "model": (TypeError, "model must be callable", {"model": 3}),
    "model-dtype": (TypeError, "model_dtype must be", {"model_dtype": torch.int64}),
    "schedule": (TypeError, "schedule must be a fastsample.Schedule", {"schedule": [0.1]}),
    "steps": (ValueError, "steps must lie in", {"steps": 0}),
    "many-steps": (ValueError, "steps must lie in", {"steps": 1001}),
    "timesteps": (ValueError, "timesteps='bogus' is no spacing", {"timesteps": "bogus"}),
    "variance": (ValueError, "variance must be one of", {"variance": "bogus"}),
    "prediction": (ValueError, "prediction", {"prediction": "bogus"}),
    "clip": (ValueError, "clip must be positive", {"clip": -1.0}),
    "threshold": (ValueError, "thresholds x0 dynamically", {"clip": DynamicThreshold(0.9)}),
    "seed": (TypeError, "seed must be an int", {"seed": 1.5}),
    "seeds": (ValueError, "seed must be one int or 3", {"seed": [1, 2]}),
    "index": (ValueError, "index", {"index": -1}),
    "idle-index": (ValueError, "index", {"index": -1, "noise": noise_of}),
    "both": (ValueError, "seed= or noise=", {"seed": 0, "noise": noise_of}),
    "no-noise": (TypeError, "noise must be a function of the step", {"noise": 3}),
    "noise-steps": (ValueError, "each of the 4 steps, got 3", {"noise": torch.zeros(3, *X0.shape)}),
    "noise-shape": (ValueError, "noise must have x's shape", {"noise": torch.zeros(4, 3, 2)}),
    "noise-dtype": (TypeError, "noise must be torch.float32", {"noise": torch.zeros(4, *X0.shape).double()}),
    "noise-device": (ValueError, "noise lies on meta", {"noise": lambda k: noise_of(k).to("meta")}),
    "noise-text": (TypeError, "noise must be a tensor", {"noise": "text"}),
    "no-mapping": (TypeError, "model_kwargs must be a mapping", {"model_kwargs": [1]}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_model_is_called(case: str) -> None:
    kind, message, changed = REFUSED[case]
    arguments: dict[str, Any] = {"model": called, "x0": X0, "schedule": LINEAR, "steps": 4, **changed}
    with pytest.raises(kind, match=message):
        nll(arguments.pop("model"), arguments.pop("x0"), **arguments)


def test_data_whose_memory_is_gone() -> None:
    x0 = torch.zeros(2, 3)
    x0.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="x0 must be a tensor whose values lie in memory"):
        nll(called, x0, schedule=LINEAR, steps=2)


def test_noise_that_ends_early() -> None:
    with pytest.raises(ValueError, match="noise ended after 2 tensors, and there are 4 steps"):
        nll(toy_model, X0, schedule=LINEAR, steps=4, noise=(noise_of(k) for k in range(2)))


def wrote(x: Tensor, t: Tensor) -> Tensor:
    return x.mul_(0.5)


MODELS: dict[str, tuple[type[Exception], str, Callable[[Tensor, Tensor], Any], str]] = {
    "shape": (ValueError, "model_output must have x's shape", lambda x, t: x[:, :, :1], "fixed_small"),
    "no-variance": (ValueError, "the table reads a learned variance", toy_model, "learned_range"),
    "no-tensor": (TypeError, "the model must return a tensor", lambda x, t: None, "fixed_small"),
    "integers": (TypeError, "model_output must be floating point", lambda x, t: x.long(), "fixed_small"),
    "device": (ValueError, "model_output lies on meta", lambda x, t: x.to("meta"), "fixed_small"),
    "writes": (ValueError, "wrote to its argument x", wrote, "fixed_small"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_used(case: str) -> None:
    kind, message, model, variance = MODELS[case]
    with pytest.raises(kind, match=message):
        nll(model, X0, schedule=LINEAR, steps=4, seed=0, variance=variance)
