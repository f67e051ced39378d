"""`fastsample sample`: what it draws and writes, and what it refuses in one line before the model is called."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastsample
from fastsample.cli import main
from fastsample.commands.sampling import model_text
from fastsample.evaluate.sources import load_samples
from fastsample.zoo import UNet, UNetConfig, save
from support.generated import TEXT, unet

QUICK = ["--model", TEXT, "--steps", "2"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a file, a folder named as a picture, and runs of training."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder.png").mkdir()
    Path("run").mkdir()
    save(unet(), Path("run", "model.safetensors"))
    Path("run", "checkpoint.pt").touch()
    return tmp_path


def four_channels() -> UNet:
    return UNet(UNetConfig(channels=4, image_size=8, widths=(8, 16), embedding=8), fastsample.Schedule.cosine(100))


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def drawn(num: int, classes: list[int], **options: object) -> torch.Tensor:
    """By the sampler itself, in one call."""
    y = torch.tensor([classes[i % len(classes)] for i in range(num)])
    options = {"steps": 2, "seed": 0, "clip": 1.0, "model_kwargs": {"y": y}} | options
    return fastsample.ddim(unet(), (num, 3, 8, 6), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [None, 2])
def test_a_picture(columns: int | None, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As save_grid makes it of what the sampler draws."""
    asked = [] if columns is None else ["--columns", str(columns)]
    assert main(["sample", *QUICK, "--num", "5", "--out", "a.png", *asked]) == 0
    told = capsys.readouterr()
    fastsample.save_grid(drawn(5, [0, 1, 2]), "want.png", columns=columns)
    assert np.array_equal(pixels("a.png"), pixels("want.png"))
    assert told.out.startswith(f"a.png: 5 samples, 3 x 8 x 6, of {TEXT}, classes 0 1 2: ddim, 2 model calls each")
    assert not told.err


def test_arrays_that_evaluate_and_train_read(place: Path) -> None:
    options = ["--num", "5", "--seed", "3", "--class", "2", "0", "--guidance", "1.5", "--null-class", "1"]
    assert main(["sample", *QUICK, *options, "--out", "a.npz"]) == 0
    found = load_samples("a.npz")
    assert found.labels is not None and found.labels.tolist() == [2, 0, 2, 0, 2]
    y = found.labels
    guided = {"guidance": 1.5, "cond": {"y": y}, "uncond": {"y": torch.ones_like(y)}, "model_kwargs": None}
    want = fastsample.to_uint8(drawn(5, [2, 0], seed=3, **guided)).permute(0, 3, 1, 2)
    assert torch.equal(found.images, want)


def test_many_are_drawn_in_calls_of_one_size(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    call = UNet.forward

    def counting(self: UNet, x: torch.Tensor, *arguments: object, **keywords: object) -> torch.Tensor:
        sizes.append(len(x))
        return call(self, x, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(UNet, "forward", counting)
    assert main(["sample", *QUICK, "--num", "65", "--out", "a.npz"]) == 0
    assert sizes[1:] == [33] * 4  # the first is a trial
    assert len(load_samples("a.npz").images) == 65


def test_what_is_there_is_replaced_and_it_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.png").symlink_to("file")
    assert main(["sample", *QUICK, "--num", "1", "--out", "a.png"]) == 0
    assert capsys.readouterr().err == "a.png is there and will be replaced\n"
    assert not Path("a.png").is_symlink() and Path("file").read_bytes() == b""


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("zoo:digits", "zoo:digits"),
        ("run", "zoo:run/model.safetensors"),
        ("run/model.safetensors", "zoo:run/model.safetensors"),
        ("run/checkpoint.pt", "zoo:run/model.safetensors"),
        ("missing", "missing"),
        ("folder.png", "folder.png"),
    ],
)
def test_models_are_named_by_their_paths_too(text: str, want: str, place: Path) -> None:
    assert model_text(text) == want


@pytest.mark.parametrize("text", ["run", "run/checkpoint.pt"])
def test_a_trained_model(text: str, place: Path) -> None:
    assert main(["sample", "--model", text, "--steps", "2", "--num", "4", "--out", "a.png"]) == 0
    fastsample.save_grid(drawn(4, [0, 1, 2]), "want.png")
    assert np.array_equal(pixels("a.png"), pixels("want.png"))


REFUSED = {
    "format": (["--out", "a.gif"], r"--out must end in one of \.png, .*\.npz, got 'a\.gif'"),
    "no-format": (["--out", "a"], "--out must end in"),
    "folder": (["--out", "folder.png"], r"folder\.png is a folder"),
    "no-folder": (["--out", "missing/a.png"], "no such folder: .*missing"),
    "unwritable": (["--out", "/proc/a.png"], "no file can be made here"),
    "num": (["--num", "0"], "num must be at least 1"),
    "model-batch": (["--model-batch", "0"], "(model_)?batch must be at least 1"),
    "columns": (["--columns", "0"], "--columns"),
    "columns-of-arrays": (["--columns", "3", "--out", "a.npz"], "--columns are of a picture"),
    "seed": (["--seed", "-1"], "seed must be at least 0"),
    "threads": (["--threads", "0"], "--threads must be from 1"),
    "model": (["--model", "digits"], "model must be zoo:digits"),
    "missing": (["--model", "zoo:none.safetensors"], "no model at none"),
    "no-model": (["--model", "zoo:file"], "file is not a safetensors file"),
    "failing": (["--model", "python:support.generated:failing"], r"failing\(\) raised RuntimeError: no weights"),
    "class": (["--class", "3"], "classes must be from 0 to 2"),
    "option": (["--option", "order=2"], "arguments of ddim are"),
    "sampler": (["--sampler", "plms"], "--sampler"),
    "channels": (["--model", "python:test_sample_command:four_channels"], "a picture has 1 or 3 channels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    before = sorted(os.listdir())
    arguments, message = REFUSED[case]
    try:
        status = main(["sample", *QUICK, *arguments])
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    shown = capsys.readouterr()
    assert status == 2 and not shown.out
    [line] = shown.err.splitlines()
    assert re.search(message, line), line
    assert sorted(os.listdir()) == before


def test_without_pillow_png_is_there_still(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert main(["sample", *QUICK, "--num", "2", "--out", "a.png"]) == 0
    assert main(["sample", *QUICK, "--num", "2", "--out", "a.jpg"]) == 2
    assert "pip install pillow" in capsys.readouterr().err
