"""The losses for every prediction, target and variance, against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample.ops.likelihood import likelihood
from fastsample.samplers import DDPM
from fastsample.schedule import Schedule
from fastsample.train import DiffusionLoss, ImportanceTimesteps, UniformTimesteps
from support.paths import GOLDEN

PREDICTIONS = ("epsilon", "v", "x0")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
SHAPES = {"images": (3, 5, 7), "sequences": (4, 9), "actions": (6,)}
SCHEDULE = Schedule.cosine(50)
T = torch.tensor([0, 1, 30, 48])


def batch(shape: tuple[int, ...], learned: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x0, noise and an output, float64."""
    draw = torch.Generator().manual_seed(seed)
    x0 = torch.randint(256, (len(T), *shape), generator=draw) / 127.5 - 1
    output = torch.randn(len(T), shape[0] * (1 + learned), *shape[1:], generator=draw, dtype=torch.float64)
    return x0.double(), torch.randn(len(T), *shape, generator=draw, dtype=torch.float64), output


def levels(x: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = torch.from_numpy(SCHEDULE.alphas_cumprod[T.numpy()]).reshape(-1, *[1] * (x.ndim - 1))
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def as_all(kind: str, given: Tensor, x: Tensor) -> dict[str, Tensor]:
    """x0, epsilon and v as one of them implies."""
    alpha, sigma = levels(x)
    x0 = {"epsilon": (x - sigma * given) / alpha, "v": alpha * x - sigma * given, "x0": given}[kind]
    epsilon = (x - alpha * x0) / sigma
    return {"x0": x0, "epsilon": epsilon, "v": alpha * epsilon - sigma * x0}


@pytest.mark.parametrize("target", PREDICTIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_simple_is_the_error_of_the_target(shape: tuple[int, ...], prediction: str, target: str) -> None:
    loss = DiffusionLoss(SCHEDULE, loss="simple", prediction=prediction, target=target)
    x0, noise, output = batch(shape, learned=False)
    xt = loss.q_sample(x0, T, noise)
    alpha, sigma = levels(x0)
    torch.testing.assert_close(xt, alpha * x0 + sigma * noise, rtol=1e-14, atol=1e-14)
    true = {"x0": x0, "epsilon": noise, "v": alpha * noise - sigma * x0}[target]
    expected = (true - as_all(prediction, output, xt)[target]).square().flatten(1).mean(1)
    terms = loss(output, x0, xt, T, noise)
    torch.testing.assert_close(terms.mse, expected, rtol=1e-9, atol=0)
    assert torch.equal(terms.loss, terms.mse)


@pytest.mark.filterwarnings("ignore:the row at t")
@pytest.mark.parametrize(
    ("loss", "variance"), [*(("vlb", variance) for variance in VARIANCES), ("hybrid", "learned_range")]
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_variational_term_is_the_samplers(
    shape: tuple[int, ...], prediction: str, loss: str, variance: str
) -> None:
    """T times ops.likelihood with DDPM's table, which has tests of its own; lambda = 0.001 in the hybrid loss."""
    losses = DiffusionLoss(SCHEDULE, loss=loss, prediction=prediction, variance=variance)
    x0, noise, output = batch(shape, losses.learns_variance)
    xt = losses.q_sample(x0, T, noise)
    table = DDPM(SCHEDULE, prediction=prediction, variance=variance).table
    expected = likelihood(x0, xt, output, table, SCHEDULE.T - 1 - T) * SCHEDULE.T
    terms = losses(output, x0, xt, T, noise)
    if loss == "vlb":
        torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=0)
    else:
        torch.testing.assert_close(terms.vb, expected / 1000, rtol=1e-12, atol=0)
        torch.testing.assert_close(terms.loss, terms.mse + terms.vb, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", ["simple", "vlb", "hybrid"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradients_are_those_of_the_definition(prediction: str, loss: str) -> None:
    """In float32 within 1e-5 of the largest of autograd's through the same terms, written out in float64."""
    losses = DiffusionLoss(SCHEDULE, loss=loss, prediction=prediction)
    x0, noise, output = batch((3, 5, 7), losses.learns_variance)
    xt = losses.q_sample(x0, T, noise)
    exact = output.clone().requires_grad_()
    single = output.float().requires_grad_()
    losses(single, x0.float(), xt.float(), T, noise.float()).loss.sum().backward()

    predicted = exact[:, :3]
    mse = (as_all(prediction, predicted, xt)[prediction] - as_all("x0", x0, xt)[prediction]).square()
    total = mse.flatten(1).mean(1).sum() if loss != "vlb" else torch.zeros(())
    if loss != "simple":
        scale = SCHEDULE.T * (0.001 if loss == "hybrid" else 1.0)
        seen = predicted.detach() if loss == "hybrid" else predicted
        total = total + scale * written_out(as_all(prediction, seen, xt)["x0"], exact[:, 3:], x0, xt).sum()
    total.backward()
    assert exact.grad is not None and single.grad is not None
    for sample in range(len(T)):
        wanted, got = exact.grad[sample], single.grad[sample].double()
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def written_out(predicted_x0: Tensor, v: Tensor, x0: Tensor, xt: Tensor) -> Tensor:
    """L_t in bits per dimension, (B,), of learned_range, plainly in float64."""
    betas, alpha_bar = torch.tensor(SCHEDULE.betas), torch.tensor(SCHEDULE.alphas_cumprod)
    before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    posterior = betas * (1 - before) / (1 - alpha_bar)
    posterior[0] = posterior[1]
    rows = [value[T].reshape(-1, 1, 1, 1) for value in (betas, alpha_bar, before, posterior)]
    beta, a, b, small = rows
    fraction = (v + 1) / 2
    log_variance = fraction * beta.log() + (1 - fraction) * small.log()

    def mean(clean: Tensor) -> Tensor:
        return (b.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - b) * xt) / (1 - a)

    gap = log_variance - small.log()
    distance = (mean(x0) - mean(predicted_x0)).square() * (-log_variance).exp()
    divergence = 0.5 * (gap + (-gap).exp() - 1 + distance)

    def cdf(y: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))

    inverse = (-0.5 * log_variance).exp()
    upper = torch.where(x0 > 0.999, 1.0, cdf(inverse * (x0 - mean(predicted_x0) + 1 / 255)))
    lower = torch.where(x0 < -0.999, 0.0, cdf(inverse * (x0 - mean(predicted_x0) - 1 / 255)))
    surprise = -(upper - lower).clamp(min=1e-12).log()
    terms = torch.where(T.reshape(-1, 1, 1, 1) == 0, surprise, divergence)
    return terms.flatten(1).mean(1) / np.log(2)


BAD = {
    "loss": ({"loss": "mse"}, "loss must be one of simple, vlb, hybrid, got 'mse'"),
    "prediction": ({"prediction": "flow"}, "prediction must be one of epsilon, v, x0, got 'flow'"),
    "target": ({"target": "noise"}, "target must be one of"),
    "variance": ({"variance": "learned"}, "variance must be one of"),
    "hybrid-fixed": ({"variance": "fixed_large"}, "leaves loss='hybrid' nothing to learn"),
    "simple-learned": ({"loss": "simple", "variance": "learned_range"}, "is not trained by loss='simple'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionLoss(SCHEDULE, **arguments)


def test_outputs_without_the_other_half_are_refused() -> None:
    x0, noise, output = batch((3, 5), learned=True)
    with pytest.raises(ValueError, match="output must have xt's shape"):
        DiffusionLoss(SCHEDULE, loss="simple")(output, x0, x0, T, noise)
    with pytest.raises(ValueError, match="output must have 6 channels"):
        DiffusionLoss(SCHEDULE)(x0, x0, x0, T, noise)


@pytest.mark.parametrize(
    ("name", "seed"), [("iddpm_linear1000_ddim50", 1), ("iddpm_cosine4000_100", 2), ("iddpm_linear300_10-15-20", 3)]
)
def test_importance_weights_match_improved_ddpm(name: str, seed: int) -> None:
    expected = np.load(GOLDEN / f"{name}.npz")["resampler_weights"]
    sampler, draw = ImportanceTimesteps(len(expected)), np.random.RandomState(seed)
    for i in range(12):
        assert sampler.warm == (i >= 10)
        losses = draw.rand(len(expected)) + 0.01 * np.arange(len(expected))
        # In parts and in another order, as batches of a training would bring them.
        order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(i))
        for part in order.split(7):
            sampler.update(part, torch.from_numpy(losses)[part])
    weights = sampler.probabilities().numpy()
    np.testing.assert_allclose(weights / weights.sum(), expected / expected.sum(), rtol=1e-6)


def test_importance_sampling_is_uniform_until_every_timestep_is_known() -> None:
    sampler = ImportanceTimesteps(4, history=2)
    for _ in range(5):
        sampler.update(torch.arange(3), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    assert torch.equal(sampler.sample(50, torch.Generator().manual_seed(0))[1], torch.ones(50))


def test_importance_sampling_keeps_means() -> None:
    """Weighted by 1 / (T p_t), the mean of a loss is what it is for uniform t; the spread is less than uniform t's."""
    losses, draw = torch.linspace(0.1, 5, 40, dtype=torch.float64) ** 3, torch.Generator().manual_seed(0)
    sampler, uniform = ImportanceTimesteps(40, history=1), UniformTimesteps(40)
    sampler.update(torch.arange(40), losses)
    spread = {}
    for each in (sampler, uniform):
        t, weights = each.sample(20000, draw)
        values = weights.double() * losses[t]
        error = values.mean() - losses.mean()
        assert abs(error) <= 4 * values.std() / len(values) ** 0.5 + 1e-6 * losses.mean()
        spread[each] = values.std()
    # All weighted losses are equal but for the uniform share of 0.001.
    assert spread[sampler] < 0.05 * spread[uniform]


def test_importance_state_goes_from_one_to_the_other() -> None:
    first, second = ImportanceTimesteps(3, history=2), ImportanceTimesteps(3, history=2)
    for _ in range(2):
        first.update(torch.arange(3), torch.rand(3))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.probabilities(), second.probabilities()) and second.warm
    for other in (ImportanceTimesteps(3), ImportanceTimesteps(4, history=2)):
        with pytest.raises(ValueError, match="losses of importance sampling must have shape"):
            other.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="uniform timesteps have no state"):
        UniformTimesteps(3).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("t", "losses", "message"),
    [
        ([0, 3], [1.0, 1.0], r"t must lie in \[0, 3\)"),
        ([0], [1.0, 1.0], "one shape"),
        ([0], [float("nan")], "finite"),
    ],
    ids=["outside", "shapes", "nan"],
)
def test_bad_updates(t: list[int], losses: list[float], message: str) -> None:
    sampler = ImportanceTimesteps(3)
    with pytest.raises(ValueError, match=message):
        sampler.update(torch.tensor(t), torch.tensor(losses))
    assert torch.equal(sampler.state_dict()["counts"], torch.zeros(3, dtype=torch.int64))


SHAPED = {
    "noise": (dict(noise=torch.zeros(1, 3, 5)), r"noise must have x0's shape \(4, 3, 5\), got \(1, 3, 5\)"),
    "xt": (dict(xt=torch.zeros(4, 1, 5)), "xt must have x0's shape"),
    "t": (dict(t=torch.tensor([0, 1])), r"t must have shape \(B,\) = \(4,\), got \(2,\)"),
    "bytes": (dict(x0=torch.zeros(4, 3, 5, dtype=torch.uint8)), "x0 must be floating"),
    "flat": (
        dict(x0=torch.zeros(4), xt=torch.zeros(4), noise=torch.zeros(4), output=torch.zeros(4)),
        "x0 must be floating",
    ),
}


@pytest.mark.parametrize(("changes", "message"), SHAPED.values(), ids=SHAPED)
def test_shapes_that_would_broadcast_are_refused(changes: dict[str, Tensor], message: str) -> None:
    loss = DiffusionLoss(SCHEDULE, loss="simple")
    zeros = torch.zeros(4, 3, 5)
    arguments = {"output": zeros, "x0": zeros, "xt": zeros, "t": T, "noise": zeros} | changes
    with pytest.raises(ValueError, match=message):
        loss(**arguments)


@pytest.mark.parametrize(("prediction", "target"), [("v", "x0"), ("x0", "v"), ("v", "epsilon"), ("x0", "epsilon")])
def test_zero_terminal_snr_has_losses(prediction: str, target: str) -> None:
    schedule = Schedule.linear(50).rescale_zero_terminal_snr()
    loss = DiffusionLoss(schedule, loss="simple", prediction=prediction, target=target)
    x0, noise, t = torch.rand(1, 3, 5), torch.randn(1, 3, 5), torch.tensor([49])
    assert loss(torch.randn(1, 3, 5), x0, loss.q_sample(x0, t, noise), t, noise).loss.isfinite()
