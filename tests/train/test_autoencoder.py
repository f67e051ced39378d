"""Autoencoders: their shapes, training, files and latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsample import distill, zoo
from fastsample.cli import main
from fastsample.train import AutoencoderSettings, ImageData, Settings, encoded, train, train_autoencoder
from fastsample.train.autoencoder import _Task
from support.interruption import stopped_at

GENERATOR = torch.Generator().manual_seed(0)
DATA = ImageData(
    torch.randint(0, 256, (20, 3, 12, 12), dtype=torch.uint8, generator=GENERATOR),
    torch.arange(20, dtype=torch.int64) % 4,
)
SMALL = AutoencoderSettings(steps=6, batch_size=4, warmup=2, width=8, latent_channels=2)


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsample.train.report._plot", lambda *arguments: None)


def made(out: Path, **changes: Any) -> zoo.Autoencoder:
    return train_autoencoder(DATA, out, SMALL, progress=False, **changes)


def test_latents_have_zero_mean_and_unit_variance(tmp_path: Path) -> None:
    autoencoder = made(tmp_path)
    latents = encoded(DATA, autoencoder)
    assert latents.shape == (2, 3, 3) and latents.count == 20 and latents.labels is DATA.labels
    assert torch.allclose(latents.latents.mean((0, 2, 3)), torch.zeros(2), atol=1e-4)
    assert torch.allclose(latents.latents.std((0, 2, 3)), torch.ones(2), atol=1e-3)
    assert autoencoder.decode(latents.latents).shape == (20, 3, 12, 12)


def test_the_loss_falls(tmp_path: Path) -> None:
    settings = AutoencoderSettings(steps=60, batch_size=8, warmup=5, width=8, latent_channels=4, lr=3e-3)
    train_autoencoder(DATA, tmp_path, settings, progress=False)
    history = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"][:, 0]
    assert history[-10:].mean() < 0.9 * history[:10].mean()


@pytest.mark.parametrize("at", [3])
def test_resuming_is_exact(at: int, tmp_path: Path) -> None:
    made(tmp_path / "straight", save_every=2)
    with stopped_at(_Task, at):
        made(tmp_path / "broken", save_every=2)
    made(tmp_path / "broken", save_every=2)
    for name in ("autoencoder.safetensors", "loss.csv"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_files(tmp_path: Path) -> None:
    autoencoder = made(tmp_path)
    again = zoo.load_autoencoder(tmp_path / "autoencoder.safetensors")
    x = DATA.scaled(torch.arange(3))
    with torch.no_grad():
        difference = again.encode(x) - autoencoder.encode(x)
    assert difference.abs().max() < 0.05 and not again.training
    zoo.save_autoencoder(autoencoder, tmp_path / "whole.safetensors")
    with torch.no_grad():
        assert torch.equal(zoo.load_autoencoder(tmp_path / "whole.safetensors").encode(x), autoencoder.encode(x))


def test_a_student_of_latents_draws_images(tmp_path: Path) -> None:
    """From images on: they are encoded for training, and what is sampled is decoded; also from its file."""
    autoencoder = made(tmp_path / "autoencoder")
    settings = Settings(steps=2, batch_size=4, timesteps=50, widths=(8, 8))
    teacher = train(encoded(DATA, autoencoder), tmp_path / "model", settings, progress=False)
    assert teacher.config.fold == 1 and teacher.config.size == (3, 3)
    short = {"settings": distill.Settings(iterations=2, batch_size=4), "progress": False}
    student = distill.lcm(teacher, DATA, tmp_path / "lcm", scales=4, autoencoder=autoencoder, **short)
    y = torch.tensor([1, 2])
    images = student.sample((2, 3, 12, 12), steps=2, seed=0, y=y)
    assert images.shape == (2, 3, 12, 12)
    again = distill.load(tmp_path / "lcm" / "student.safetensors")
    torch.testing.assert_close(again.sample((2, 3, 12, 12), steps=2, seed=0, y=y), images)
    with pytest.raises(ValueError, match=r"shape must be \(B, 3, 12, 12\), got \(2, 2, 3, 3\)"):
        student.sample((2, 2, 3, 3), y=y)
    with pytest.raises(ValueError, match="autoencoder makes latents of shape"):
        student.decode_with(zoo.Autoencoder(zoo.AutoencoderConfig()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"kl_weight": -1.0}, "kl_weight must not be negative"),
        ({"warmup": 0.5}, "warmup must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        AutoencoderSettings(**fields)


@pytest.mark.parametrize(
    ("size", "message"), [((12, 8), "images must be square"), ((14, 14), "image_size must be a multiple of 4")], ids=str
)
def test_bad_images(size: tuple[int, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_autoencoder(ImageData(torch.zeros(2, 1, *size, dtype=torch.uint8)), tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_files_that_hold_no_autoencoder(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        zoo.load_autoencoder(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match="no autoencoder at"):
        zoo.load_autoencoder(tmp_path)
    from fastsample.zoo import _DIGITS

    with pytest.raises(ValueError, match="was not made by fastsample autoencoder"):
        zoo.load_autoencoder(_DIGITS)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsample.commands.autoencoder.load_data", lambda _: DATA)
    sizes = ["--steps", "2", "--batch-size", "2", "--width", "8"]
    assert main(["autoencoder", "--data", "x", "--out", str(tmp_path / "out"), *sizes]) == 0
    assert "fastsample.zoo.load_autoencoder(" in capsys.readouterr().out
    assert main(["autoencoder", "--data", "x", "--out", str(tmp_path / "out"), *sizes, "--seed", "1"]) == 2
    assert "was made with seed = 0, now it is 1" in capsys.readouterr().err


def test_an_averaged_model_has_no_history(tmp_path: Path) -> None:
    data = encoded(DATA, made(tmp_path / "autoencoder"))
    model = train(
        data, tmp_path / "model", Settings(steps=3, batch_size=4, timesteps=50, widths=(8, 8)), progress=False
    )
    assert all(parameter.is_leaf and not parameter.requires_grad for parameter in model.parameters())
