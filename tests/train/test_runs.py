"""Runs that are killed, extended, or shared by processes end with the weights of one that is not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsample import zoo
from fastsample.train import ImageData, Settings, load_data, train
from fastsample.train.trainer import _Run

SMALL = Settings(steps=12, batch_size=4, warmup=2, timesteps=20, widths=(8, 16), lr=1e-2, cooldown=0.5)
IMPORTANCE = replace(SMALL, timesteps=2, schedule="cosine", loss="vlb", timestep_sampler="importance", steps=60)
SETTINGS = {
    "hybrid": SMALL,
    "importance": IMPORTANCE,
    "simple-x0": replace(SMALL, loss="simple", prediction="x0", target=None),
    "linear-v": replace(SMALL, schedule="linear", timesteps=30, prediction="v", variance="learned_range", loss="vlb"),
}


def data() -> ImageData:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (10, 3, 9, 6), generator=draw, dtype=torch.uint8)
    return ImageData(images, torch.arange(10) % 3)


def interrupted(out: Path, settings: Settings, at: int, save_every: int) -> None:
    """A run that stops with Ctrl-C at the beginning of this step."""
    step = _Run.step

    def until(run: _Run, i: int) -> None:
        if i == at:
            raise KeyboardInterrupt
        step(run, i)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Run, "step", until)
        train(data(), out, settings, save_every=save_every, progress=False)


def same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir() if path.suffix in (".safetensors", ".csv"))
    assert names == sorted(path.name for path in other.iterdir() if path.suffix in (".safetensors", ".csv"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("name", SETTINGS)
def test_resuming_is_exact(name: str, tmp_path: Path) -> None:
    settings = SETTINGS[name]
    train(data(), tmp_path / "straight", settings, progress=False)
    for at in (2, settings.steps // 2 + 1, settings.steps - 1):
        interrupted(tmp_path / "broken", settings, at, save_every=5)
    train(data(), tmp_path / "broken", settings, save_every=5, progress=False)
    same_files(tmp_path / "straight", tmp_path / "broken")
    assert zoo.load(tmp_path / "broken" / "model.safetensors").prediction == settings.prediction


EXTENSIONS = {"finished": None, "before-cooldown": 3, "in-cooldown": 10}


@pytest.mark.parametrize("stop", EXTENSIONS.values(), ids=EXTENSIONS)
def test_an_extended_run_is_the_longer_one(stop: int | None, tmp_path: Path) -> None:
    longer = replace(SMALL, steps=20)
    train(data(), tmp_path / "straight", longer, progress=False)
    if stop is None:
        train(data(), tmp_path / "extended", SMALL, progress=False)
    else:
        interrupted(tmp_path / "extended", SMALL, stop, save_every=1)
    interrupted(tmp_path / "extended", longer, 15, save_every=4)
    train(data(), tmp_path / "extended", longer, progress=False)
    same_files(tmp_path / "straight", tmp_path / "extended")


def test_a_run_cannot_be_cut_short_once_it_is_too_far(tmp_path: Path) -> None:
    train(data(), tmp_path, SMALL, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="has 12 of 12 steps behind it"):
        train(data(), tmp_path, replace(SMALL, steps=8), progress=False)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_model_is_written_where_a_kill_came_before_it(tmp_path: Path) -> None:
    train(data(), tmp_path, SMALL, progress=False)
    written = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    train(data(), tmp_path, SMALL, progress=False)
    assert (tmp_path / "model.safetensors").read_bytes() == written


def start(out: Path, source: Path, *words: str, launcher: tuple[str, ...] = ("-m",)) -> subprocess.Popen:
    """`fastsample train` as a process of its own."""
    small = "--batch-size 2 --widths 8 16 --timesteps 20 --warmup 2 --threads 1".split()
    command = [sys.executable, *launcher, "fastsample", "train", "--data", str(source), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *small, *words], env=environment, stderr=subprocess.PIPE, text=True)


def stored(path: Path) -> Path:
    images = data()
    assert images.labels is not None
    np.savez(path, images=images.images.permute(0, 2, 3, 1).numpy(), labels=images.labels.numpy())
    return path


def test_killed_at_any_moment_and_extended(tmp_path: Path) -> None:
    """SIGKILL at five random moments of 200 steps, then 300: the weights of 300 steps in one go."""
    source, moments = stored(tmp_path / "data.npz"), random.Random(0)
    words = ("--save-every", "3", "--steps", "200")
    straight = start(tmp_path / "straight", source, "--steps", "300")
    for _ in range(5):
        run = start(tmp_path / "killed", source, *words)
        since, done = time.monotonic(), progress_of(tmp_path / "killed")
        while run.poll() is None and progress_of(tmp_path / "killed") <= done and time.monotonic() < since + 60:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert run.returncode == -signal.SIGKILL
    for steps in ("200", "300"):
        run = start(tmp_path / "killed", source, "--save-every", "50", "--steps", steps)
        assert run.communicate()[1] is not None and run.returncode == 0
    assert straight.communicate()[1] is not None and straight.returncode == 0
    same_files(tmp_path / "straight", tmp_path / "killed")


def progress_of(out: Path) -> int:
    try:
        return int((out / "loss.csv").read_text().splitlines()[-1].partition(",")[0])
    except (OSError, IndexError, ValueError):
        return 0


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    source = stored(tmp_path / "data.npz")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    words = ("--steps", "60", "--loss", "vlb", "--timestep-sampler", "importance", "--timesteps", "2")
    two = start(tmp_path / "two", source, *words, launcher=launcher)
    one = start(tmp_path / "one", source, *words, "--batch-size", "4")
    for run in (one, two):
        error = run.communicate()[1]
        assert run.returncode == 0, error
    curves = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["history"].numpy() for name in ("one", "two")
    ]
    # Gradients are summed in another order: that is float32's rounding, and 60 steps let it grow.
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)
    np.testing.assert_allclose(curves[1][:3], curves[0][:3], rtol=1e-5)


FOREIGN = {"model": "model.safetensors", "losses": "loss.csv", "picture": "loss.png"}


@pytest.mark.parametrize("name", FOREIGN.values(), ids=FOREIGN)
def test_somebody_elses_files_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name} but no checkpoint.pt"):
        train(data(), tmp_path, SMALL, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    interrupted(tmp_path, SMALL, 7, save_every=3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    draw = _Run._draw

    def spoilt(run: _Run, i: int) -> tuple[torch.Tensor, ...]:
        x0, *others = draw(run, i)
        return (x0 * (torch.nan if i == 8 else 1), *others)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ArithmeticError, match="loss is not finite at step 8"):
        patch.setattr(_Run, "_draw", spoilt)
        train(data(), tmp_path, SMALL, save_every=3, progress=False)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(data(), tmp_path / "straight", SMALL, progress=False)
    train(data(), tmp_path, SMALL, progress=False)
    for name in ("model.safetensors", "loss.csv"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    step = _Run.step

    def overflowing(run: _Run, i: int) -> None:
        step(run, i)
        if i == 5:
            next(run.model.parameters()).data.fill_(torch.inf)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ArithmeticError, match="weights is not finite at step 6"):
        patch.setattr(_Run, "step", overflowing)
        train(data(), tmp_path, SMALL, save_every=3, progress=False)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"].shape == (3, 3)


def test_a_folder_of_colour_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "images").mkdir()
    for i in range(4):
        image.new("RGB", (32, 32), (50 * i, 10, 200)).save(tmp_path / "images" / f"{i}.png")
    settings = replace(SMALL, steps=2, widths=None)
    trained = train(load_data(tmp_path / "images"), tmp_path / "run", settings, progress=False)
    assert trained(torch.randn(2, 3, 32, 32), torch.tensor([0, 19])).shape == (2, 6, 32, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "sqrt"}, "schedule must be one of linear, scaled_linear, cosine"),
        ({"schedule": "linear", "timesteps": 20}, "timesteps must be more than 20 for a linear schedule"),
        ({"timesteps": 1}, "timesteps must be at least 2"),
        ({"loss": "simple", "variance": "learned_range"}, "not trained by loss='simple'"),
        ({"timestep_sampler": "loss"}, "timestep_sampler must be one of uniform, importance"),
        ({"cooldown": 2.0}, r"cooldown must lie in \[0, 1\]"),
    ],
    ids=["schedule", "few-linear", "one", "untrained", "sampler", "cooldown"],
)
def test_bad_settings(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**fields)  # type: ignore[arg-type]


def test_the_learning_rate_forgets_the_end_before_the_cooldown() -> None:
    short, long = Settings(steps=200, warmup=10, cooldown=0.2), Settings(steps=300, warmup=10, cooldown=0.2)
    assert short.cooldown_start() == 160
    rates = [short.lr_at(i) for i in range(200)]
    assert rates[:160] == [long.lr_at(i) for i in range(160)]
    assert rates[9] == rates[159] == short.lr and rates[0] == short.lr / 10
    assert all(later < earlier for earlier, later in zip(rates[159:], rates[160:], strict=False)) and rates[-1] > 0
