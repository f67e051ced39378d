"""Runs that are killed, extended, or shared by processes end with the weights of one that is not."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from fastsample import zoo
from fastsample.train import Settings, load_data, train
from fastsample.train.trainer import _Run
from support.ahead import TESTS, Ahead, in_a_process
from support.interruption import stopped_at
from support.killed_runs import data

SMALL = Settings(steps=12, batch_size=4, warmup=2, timesteps=20, widths=(8, 16), lr=1e-2, cooldown=0.5)
IMPORTANCE = replace(SMALL, timesteps=2, schedule="cosine", loss="vlb", timestep_sampler="importance", steps=60)
SETTINGS = {
    "hybrid": SMALL,
    "importance": IMPORTANCE,
    "simple-x0": replace(SMALL, loss="simple", prediction="x0"),
    "linear-v": replace(SMALL, schedule="linear", timesteps=30, prediction="v", variance="learned_range", loss="vlb"),
}


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot takes longer than all steps of such a run, and test_train looks at one."""
    monkeypatch.setattr("fastsample.train.report._plot", lambda *arguments: None)


def interrupted(out: Path, settings: Settings, at: int, save_every: int) -> None:
    """A run that stops with Ctrl-C at the beginning of this step."""
    with stopped_at(_Run, at):
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
        interrupted(tmp_path / "broken", settings, at, save_every=settings.steps // 3)
    train(data(), tmp_path / "broken", settings, progress=False)
    same_files(tmp_path / "straight", tmp_path / "broken")
    assert zoo.load(tmp_path / "broken" / "model.safetensors").prediction == settings.prediction


EXTENSIONS = {"finished": None, "before-cooldown": 4, "in-cooldown": 8}


@pytest.mark.parametrize("stop", EXTENSIONS.values(), ids=EXTENSIONS)
def test_an_extended_run_is_the_longer_one(stop: int | None, tmp_path: Path) -> None:
    longer = replace(SMALL, steps=20)
    train(data(), tmp_path / "straight", longer, progress=False)
    if stop is None:
        train(data(), tmp_path / "extended", SMALL, progress=False)
    else:
        interrupted(tmp_path / "extended", SMALL, stop, save_every=4)
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


@Ahead
def killed_runs() -> TemporaryDirectory:
    folder = TemporaryDirectory()
    in_a_process("-m", "support.killed_runs", folder.name, cwd=TESTS)
    return folder


@pytest.mark.ahead(killed_runs)
def test_killed_at_any_moment_and_extended() -> None:
    """SIGKILL at five random moments of 200 steps, then 300: the weights of 300 steps in one go."""
    with killed_runs.result() as folder:
        same_files(Path(folder, "straight"), Path(folder, "killed"))


PAIR = replace(IMPORTANCE, batch_size=2, widths=(8, 16), lr=1e-3)


@Ahead
def two_processes() -> TemporaryDirectory:
    folder = TemporaryDirectory()
    images = data()
    assert images.labels is not None
    pixels = images.images.permute(0, 2, 3, 1).numpy()
    np.savez(Path(folder.name, "data.npz"), images=pixels, labels=images.labels.numpy())
    options = {"--data": "data.npz", "--out": "two", "--threads": "1"}
    for name, value in asdict(PAIR).items():
        if value is not None:
            options["--" + name.replace("_", "-")] = value
    words = [str(word) for pair in options.items() for part in pair for word in np.atleast_1d(part)]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastsample", "train")
    in_a_process(*launcher, *words, cwd=Path(folder.name))
    return folder


@pytest.mark.ahead(two_processes)
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    with two_processes.result() as folder:
        two = torch.load(Path(folder, "two", "checkpoint.pt"), weights_only=True)["history"]
    train(data(), tmp_path, replace(PAIR, batch_size=4), progress=False)
    one = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"]
    # Gradients are summed in another order: that is float32's rounding, and Adam lets it grow with the steps.
    torch.testing.assert_close(two[:5], one[:5], rtol=1e-5, atol=0)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=0)


FOREIGN = {"model": "model.safetensors", "losses": "loss.csv", "picture": "loss.png"}


@pytest.mark.parametrize("name", FOREIGN.values(), ids=FOREIGN)
def test_somebody_elses_files_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name} but no checkpoint.pt"):
        train(data(), tmp_path, SMALL, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    interrupted(tmp_path, SMALL, 7, save_every=3)
    kept = ("checkpoint.pt", "model.safetensors", "loss.csv")
    before = [(tmp_path / name).read_bytes() for name in kept]
    draw = _Run._draw

    def spoilt(run: _Run, i: int) -> tuple[torch.Tensor, ...]:
        x0, *others = draw(run, i)
        return (x0 * (torch.nan if i == 8 else 1), *others)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ArithmeticError, match="loss is not finite at step 8"):
        patch.setattr(_Run, "_draw", spoilt)
        train(data(), tmp_path, SMALL, save_every=3, progress=False)
    assert before == [(tmp_path / name).read_bytes() for name in kept]
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
    assert all(later < earlier for earlier, later in pairwise(rates[159:])) and rates[-1] > 0


@pytest.mark.parametrize("at", [7, 11], ids=["cooling", "last"])
def test_a_run_killed_before_its_first_checkpoint_continues(at: int, tmp_path: Path) -> None:
    """Then the folder has the state before the cooldown alone."""
    train(data(), tmp_path / "straight", SMALL, progress=False)
    interrupted(tmp_path / "broken", SMALL, at, save_every=1000)
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["trunk.pt"]
    train(data(), tmp_path / "broken", SMALL, progress=False)
    same_files(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.parametrize("cooldown", [0.0, 1.0])
def test_all_or_nothing_may_be_cooldown(cooldown: float, tmp_path: Path) -> None:
    settings = replace(SMALL, cooldown=cooldown)
    train(data(), tmp_path / "straight", settings, progress=False)
    interrupted(tmp_path / "broken", settings, 5, save_every=4)
    train(data(), tmp_path / "broken", settings, progress=False)
    same_files(tmp_path / "straight", tmp_path / "broken")
