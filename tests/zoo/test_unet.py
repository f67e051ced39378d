"""The U-Net for images of any size, and what it returns against what its network gives."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastsample
from fastsample import Schedule
from fastsample.zoo import UNet, UNetConfig, load, save

SCHEDULE = Schedule.cosine(1000)


def made(config: UNetConfig, schedule: Schedule = SCHEDULE) -> UNet:
    """A UNet whose layers are random, those included that begin as zeros."""
    torch.manual_seed(0)
    model = UNet(config, schedule)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.mark.parametrize(
    ("channels", "size", "fold", "widths"),
    [
        (1, (28, 28), 2, (48, 96)),
        (3, (32, 32), 2, (48, 96)),
        (3, (8, 8), 2, (48, 96)),
        (4, (64, 64), 2, (48, 96, 96)),
        (3, (17, 23), 2, (48, 96)),
        (1, (5, 40), 2, (48, 96, 96)),
        (3, (128, 96), 4, (48, 96, 96)),
        (3, (256, 256), 4, (48, 96, 96, 96)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_depth_and_folding_follow_the_size(channels: int, size: tuple[int, int], fold: int, widths: tuple) -> None:
    config = UNetConfig.fitting(channels, size, num_classes=0)
    assert (config.fold, config.widths, config.size) == (fold, widths, size)
    small = UNetConfig.fitting(channels, size, num_classes=3, widths=[8] * len(widths))
    x = torch.randn(2, channels, *size)
    assert made(small)(x, torch.tensor([3, 999]), torch.tensor([0, 3])).shape == (2, 2 * channels, *size)


def test_every_pixel_of_a_padded_image_counts_and_is_counted() -> None:
    model = made(UNetConfig.fitting(1, (5, 7), num_classes=0, widths=(8, 8)))
    x = torch.randn(1, 1, 5, 7, requires_grad=True)
    model(x, torch.tensor([500])).square().sum().backward()
    assert x.grad is not None and (x.grad != 0).all()
    assert (model(torch.zeros(1, 1, 5, 7), torch.tensor([500])) != 0).all()


def test_one_resolution() -> None:
    assert made(UNetConfig(widths=(16,)))(torch.zeros(1, 1, 28, 28), torch.tensor([0])).shape == (1, 2, 28, 28)


def x0_and_epsilon(kind: str, given: Tensor, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    if kind == "epsilon":
        return (x - sigma * given) / alpha, given
    if kind == "v":
        return alpha * x - sigma * given, sigma * x + alpha * given
    return given, (x - alpha * given) / sigma


@pytest.mark.parametrize("t", [0, 1, 500, 998], ids=str)
@pytest.mark.parametrize("target", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_prediction_says_what_the_target_says(prediction: str, target: str, t: int) -> None:
    config = UNetConfig(widths=(8, 8), target=target, prediction=prediction)
    model = made(config).double()
    own = made(UNetConfig(widths=(8, 8), target=target, prediction=target)).double()
    x, when = torch.randn(2, 1, 28, 28, dtype=torch.float64), torch.full((2,), t)
    alpha_bar = SCHEDULE.alphas_cumprod[t]
    levels = float(alpha_bar**0.5), float((1 - alpha_bar) ** 0.5)
    returned, given = model(x, when), own(x, when)
    assert torch.equal(returned[:, 1:], given[:, 1:])
    x0, epsilon = x0_and_epsilon(target, given[:, :1], x, *levels)
    expected = {"epsilon": epsilon, "x0": x0, "v": levels[0] * epsilon - levels[1] * x0}[prediction]
    # alpha and sigma are known in float32; x0 from epsilon and epsilon from x0 divide by one of them.
    scale = expected.abs().max() + x.abs().max() / min(levels)
    assert (returned[:, :1] - expected).abs().max() <= 4e-7 * scale


def test_between_timesteps_levels_are_the_samplers() -> None:
    from fastsample.times.levels import noise_levels

    model, t = made(UNetConfig(widths=(8,), target="v")), np.array([998.25, 500.5, 0.75])
    expected = noise_levels(SCHEDULE, t)
    for actual, wanted in zip(model._levels(torch.from_numpy(t)), expected, strict=True):
        np.testing.assert_allclose(actual, wanted[:-1], rtol=1e-5)


def test_zero_terminal_snr_has_levels() -> None:
    model = made(UNetConfig(widths=(8,), target="v"), SCHEDULE.rescale_zero_terminal_snr())
    alpha, sigma = model._levels(torch.tensor([999, 998]))
    assert alpha[0] == 0 and sigma[0] == 1 and alpha[1] > 0
    assert model(torch.randn(1, 1, 28, 28), torch.tensor([999])).isfinite().all()


def test_a_copy_in_half_precision_keeps_its_levels() -> None:
    model = made(UNetConfig(widths=(8,), target="v"))
    half = copy.deepcopy(model).half()
    assert torch.equal(half._levels(torch.arange(1000))[0], model._levels(torch.arange(1000))[0])
    x = torch.randn(1, 1, 28, 28)
    torch.testing.assert_close(
        half(x.half(), torch.tensor([3])).float(), model(x, torch.tensor([3])), atol=0.05, rtol=0
    )


def test_what_a_model_says_of_itself_is_stored(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = UNetConfig.fitting(3, (20, 12), widths=(8, 16), prediction="v", target="x0", learned_variance=False)
    model = made(config)
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert loaded.config == config and loaded.prediction == "v"
    x, t = torch.randn(2, 3, 20, 12), torch.tensor([3, 999])
    assert torch.equal(loaded(x, t), model(x, t)) and loaded(x, t).shape == x.shape


def test_files_of_two_resolutions_by_their_earlier_names(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """As they were before a model could have more than two."""
    import json

    from safetensors.torch import save_file

    model = made(UNetConfig(widths=(8, 16)))
    earlier = {"downs.0.": "down.", "shrinks.0.": "shrink.", "grows.0.": "grow.", "ups.0.": "up."}

    def name(now: str) -> str:
        return next((old + now[len(new) :] for new, old in earlier.items() if now.startswith(new)), now)

    about = {"config": {"widths": [8, 16], "image_size": 28}, "betas": SCHEDULE.betas.tolist()}
    tensors = {name(now): value.contiguous() for now, value in model.state_dict().items()}
    assert "up.film.weight" in tensors
    save_file(tensors, tmp_path / "m.safetensors", metadata={"fastsample_unet": json.dumps(about)})
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 999])
    assert torch.equal(load(tmp_path / "m.safetensors")(x, t), model(x, t))


def test_a_network_that_gives_v_stays_exact_next_to_pure_noise() -> None:
    """An error of its own in x0 is one of v, however it is returned; that of an epsilon network grows 2e4-fold."""
    errors = {}
    for target in ("epsilon", "v"):
        model = made(UNetConfig(widths=(8, 8), target=target)).double()
        x = torch.randn(1, 1, 28, 28, dtype=torch.float64)
        alpha, sigma = SCHEDULE.alphas_cumprod[999] ** 0.5, (1 - SCHEDULE.alphas_cumprod[999]) ** 0.5
        x0 = (x - sigma * model(x, torch.tensor([999]))[:, :1]) / alpha
        nn.init.constant_(model.leave.bias, 0.01)
        again = (x - sigma * model(x, torch.tensor([999]))[:, :1]) / alpha
        errors[target] = (again - x0).abs().max().item()
    assert errors["v"] < 0.2 and errors["epsilon"] > 100


def test_samplers_take_either(seed: int = 0) -> None:
    model = made(UNetConfig(widths=(8, 8), target="v"))
    assert fastsample.ddim(model, (1, 1, 28, 28), steps=3, seed=seed).isfinite().all()


def test_zero_terminal_snr_tells_a_network_of_epsilon_nothing() -> None:
    with pytest.raises(ValueError, match="target='epsilon' tells nothing where alpha bar is 0"):
        UNet(UNetConfig(prediction="v", target="epsilon"), SCHEDULE.rescale_zero_terminal_snr())
    model = made(UNetConfig(widths=(8,), target="v"), SCHEDULE.rescale_zero_terminal_snr())
    assert model(torch.randn(1, 1, 28, 28), torch.tensor([998.5])).isfinite().all()
