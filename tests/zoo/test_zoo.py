"""The U-Net, its files and the bundled digits model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastsample import zoo
from fastsample.schedule import Schedule
from fastsample.zoo import UNet, UNetConfig

DIGITS = Path(zoo.__file__).with_name("digits.safetensors")
TINY = UNetConfig(channels=3, image_size=8, num_classes=4, widths=(8, 16), embedding=16, groups=4, heads=2)


def tiny(seed: int = 0) -> UNet:
    """A small model with all weights random; freshly made ones predict 0."""
    torch.manual_seed(seed)
    model = UNet(TINY, Schedule.cosine(50))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("batch", [1, 3])
def test_output_holds_epsilon_and_v(batch: int) -> None:
    out = tiny()(torch.randn(batch, 3, 8, 8), torch.zeros(batch, dtype=torch.int64))
    assert out.shape == (batch, 6, 8, 8)
    assert out.is_contiguous()


def test_each_image_is_computed_on_its_own() -> None:
    """In float64: how batches of other sizes round differs from CPU to CPU."""
    model, x = tiny().double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    t, y = torch.tensor([0, 20, 49]), torch.tensor([0, 4, 2])
    together = model(x, t, y)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1], t[i : i + 1], y[i : i + 1]))


def test_timestep_and_class_matter() -> None:
    model, x = tiny(), torch.randn(1, 3, 8, 8)
    base = model(x, torch.tensor([5]), torch.tensor([1]))
    assert not torch.allclose(base, model(x, torch.tensor([6]), torch.tensor([1])))
    assert not torch.allclose(base, model(x, torch.tensor([5]), torch.tensor([2])))


def test_no_labels_is_the_last_class() -> None:
    model, x, t = tiny(), torch.randn(2, 3, 8, 8), torch.tensor([5, 6])
    torch.testing.assert_close(model(x, t), model(x, t, torch.full((2,), 4)))


def test_fractional_timesteps() -> None:
    model, x = tiny(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x, torch.tensor([5, 6])), model(x, torch.tensor([5.0, 6.0])))


def test_other_dtypes() -> None:
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 6])
    single, double = tiny()(x, t), tiny().double()(x.double(), t)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single, double.float(), rtol=1e-4, atol=1e-4)


def test_bad_inputs() -> None:
    model, x, t = tiny(), torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, 8, 8\), got \(2, 1, 8, 8\)"):
        model(torch.zeros(2, 1, 8, 8), t)
    with pytest.raises(ValueError, match=r"t must be \(2,\), got \(\)"):
        model(x, torch.tensor(3))
    with pytest.raises(ValueError, match=r"y must be \(2,\), got \(1,\)"):
        model(x, t, torch.tensor([1]))
    with pytest.raises(TypeError, match=r"y must be an int64 tensor, got torch.float32"):
        model(x, t, torch.zeros(2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "image_size must be a positive number or two, got 0"),
        ({"image_size": (8, 0)}, r"image_size must be a positive number or two, got \(8, 0\)"),
        ({"fold": 0}, "fold must be at least 1"),
        ({"prediction": "noise"}, "prediction must be one of epsilon, v, x0, got 'noise'"),
        ({"target": "flow"}, "target must be one of epsilon, v, x0, got 'flow'"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"widths": (48, 50)}, "widths must be multiples of groups"),
        ({"widths": ()}, "widths must not be empty"),
        ({"embedding": 6}, "embedding must be a multiple of 4"),
        ({"heads": 5}, "must be a multiple of heads"),
    ],
)
def test_bad_config(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**fields)  # type: ignore[arg-type]


def test_file_round_trip(tmp_path: Path) -> None:
    model, x, t = tiny(), torch.randn(2, 3, 8, 8), torch.tensor([5, 6])
    zoo.save(model, tmp_path / "m.safetensors")
    state = torch.random.get_rng_state()
    loaded = zoo.load(tmp_path / "m.safetensors")
    assert torch.equal(state, torch.random.get_rng_state())
    assert loaded.config == TINY
    assert loaded.schedule == model.schedule
    assert not loaded.training
    assert torch.equal(loaded(x, t), model(x, t))
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model at .*nothing\.safetensors"):
        zoo.load(tmp_path / "nothing.safetensors")
    garbage, foreign = tmp_path / "garbage.safetensors", tmp_path / "foreign.safetensors"
    garbage.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        zoo.load(garbage)
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="was not made by fastsample train"):
        zoo.load(foreign)


def test_default_model_is_small() -> None:
    model = UNet(UNetConfig(), Schedule.cosine(1000))
    assert sum(parameter.numel() for parameter in model.parameters()) <= 950_000


def test_missing_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zoo, "_DIGITS", tmp_path / "digits.safetensors")
    with pytest.raises(FileNotFoundError, match="bundled digits model is missing"):
        zoo.digits()


class TestDigits:
    def test_file(self) -> None:
        assert DIGITS.stat().st_size <= 4_000_000
        model = zoo.digits()
        assert model.config == UNetConfig(target="v")
        assert model.schedule == Schedule.cosine(1000)
        assert not model.training

    def test_recovers_noise(self) -> None:
        """On a stroke under half noise, the error is a fraction of that of predicting 0."""
        model = zoo.digits()
        x0 = torch.full((8, 1, 28, 28), -1.0)
        x0[:, :, 5:23, 13:16] = 1
        abar = float(model.schedule.alphas_cumprod[500])
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        xt = abar**0.5 * x0 + (1 - abar) ** 0.5 * noise
        with torch.inference_mode():
            epsilon = model(xt, torch.full((8,), 500), torch.full((8,), 1))[:, :1]
        assert (epsilon - noise).square().mean() < 0.05
