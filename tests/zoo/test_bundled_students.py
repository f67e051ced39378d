"""The models that come with the package: each draws what it is for, and the LoRAs do what they say."""

from __future__ import annotations

import pytest
import torch

import fastsample
from fastsample import lora, zoo
from fastsample.train import load_data

Y = torch.arange(10)


@pytest.mark.parametrize("name", zoo.STUDENTS)
def test_every_student_draws_digits(name: str) -> None:
    """In all its steps, from the same seed the same; told its guidance where it has a range."""
    student = zoo.digits(name)
    told = {"guidance": 1.25} if isinstance(student.facts.guidance, tuple) else {}
    for steps in student.steps():
        images = student.sample((10, 1, 28, 28), steps=steps, seed=0, y=Y, **told)
        assert images.shape == (10, 1, 28, 28) and torch.isfinite(images).all()
        # Mostly black, with white strokes: blank, grey or noisy images are neither.
        assert 0.6 < float((images < -0.8).double().mean()) < 0.95
        assert 0.03 < float((images > 0.5).double().mean()) < 0.3


@pytest.mark.parametrize("name", [*zoo.STUDENTS, "lora", "latent", "autoencoder"])
def test_none_is_larger_than_it_should_be(name: str) -> None:
    files = {**zoo.STUDENTS, "lora": zoo.LORAS["leaning"], "latent": zoo._LATENT, "autoencoder": zoo._AUTOENCODER}
    assert files[name].stat().st_size < (1 if name == "autoencoder" else 4) * 2**20


def test_the_style_leans_and_adds_up_with_the_lcm_lora() -> None:
    """By the slant of the strokes: -m_xy / m_yy of the ink."""
    model, times = zoo.digits(), zoo.digits("lcm-lora").timesteps(4)
    y = torch.arange(40) % 10
    options = {"timesteps": times, "clip": 1.0, "seed": 1, "model_kwargs": {"y": y}}
    lora.attach(model, zoo.LORAS["lcm"], name="lcm")
    straight = slant(fastsample.lcm(model, (40, 1, 28, 28), **options))
    lora.attach(model, zoo.LORAS["leaning"], name="style")
    lora.set_adapters(model, {"lcm": 1.0, "style": 0.8})
    leaning = slant(fastsample.lcm(model, (40, 1, 28, 28), **options))
    assert float(leaning - straight) < -0.2


def slant(images: torch.Tensor) -> torch.Tensor:
    """The mean over images of how many columns strokes move to the right in a row upwards."""
    ink = (images[:, 0].double() + 1).clamp(min=0)
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    mass = ink.sum((1, 2))
    down = rows - ((ink * rows).sum((1, 2)) / mass)[:, None, None]
    right = columns - ((ink * columns).sum((1, 2)) / mass)[:, None, None]
    return (-(ink * down * right).sum((1, 2)) / (ink * down * down).sum((1, 2))).mean()


def test_latent_digits_are_encoded_and_decoded() -> None:
    model, autoencoder = zoo.latent_digits()
    x = load_data("mnist5k-held-out").scaled(torch.arange(0, 1000, 50))
    with torch.no_grad():
        latents = autoencoder.encode(x)
        assert latents.shape == (20, 4, 7, 7) and 0.8 < float(latents.std()) < 1.2
        assert float((autoencoder.decode(latents) - x).square().mean()) < 0.006
    assert model.config.num_classes == 10 and model.prediction == "epsilon"
