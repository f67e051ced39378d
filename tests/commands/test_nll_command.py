"""`fastsample nll`: what it prints and writes, and what it refuses in one line before the model is called."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastsample import Schedule, nll
from fastsample.cli import main
from fastsample.commands import nll as command
from fastsample.zoo import UNet, UNetConfig, save
from support.levels import on_threads

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
LABELS = np.array([0, 0, 1, 1, 2, 2])
QUICK = ["--model", "model.safetensors"]


def small_model(**others: Any) -> UNet:
    """With random weights in its last layer, which begins as zeros."""
    torch.manual_seed(0)
    config = UNetConfig(**{"image_size": 8, "num_classes": 3, "widths": (8, 16), "embedding": 8} | others)
    model = UNet(config, Schedule.cosine(12)).eval()
    torch.nn.init.normal_(model.leave.weight, std=0.3)
    torch.nn.init.normal_(model.embed_class.weight)
    return model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with models, data of several kinds, a file and a FIFO."""
    monkeypatch.chdir(tmp_path)
    save(small_model(), "model.safetensors")
    save(small_model(num_classes=0, learned_variance=False, prediction="v"), "plain.safetensors")
    np.savez("data.npz", images=IMAGES, labels=LABELS)
    np.savez("many.npz", images=IMAGES, labels=LABELS + 1)
    np.savez("colour.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    np.savez("wide.npz", images=np.zeros((2, 8, 9), np.uint8))
    Path("file").touch()
    Path("folder.csv").mkdir()
    os.mkfifo("fifo.csv")
    for label, name in enumerate("abc"):
        Path("folder", name).mkdir(parents=True)
        for i in (0, 1):
            Image.fromarray(IMAGES[2 * label + i]).save(Path("folder", name, f"{i}.png"))
    return tmp_path


def wanted(places: list[int], labelled: bool = True, model: UNet | None = None, **arguments: Any) -> Tensor:
    """The bound by nll itself."""
    x0 = torch.from_numpy(IMAGES[places])[:, None].float() / 127.5 - 1
    keywords = {"y": torch.from_numpy(LABELS[places])} if labelled else None
    given: dict[str, Any] = {"steps": 12, "variance": "learned_range", "seed": 0} | arguments
    return nll(model or small_model(), x0, index=places, model_kwargs=keywords, **given).total_bpd


def rows(path: str = "out.csv") -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "npz": (["data.npz"], {}),
    "folder": (["folder"], {}),
    "unlabelled": (["data.npz", "--unlabelled"], {"labelled": False}),
    "labels-left-out": (["many.npz", "--unlabelled"], {"labelled": False}),
    "batches": (["data.npz", "--batch-size", "4"], {}),
    "steps": (["data.npz", "--steps", "5"], {"steps": 5}),
    "timesteps": (["data.npz", "--timesteps", "ddim6"], {"timesteps": "ddim6", "steps": None}),
    "variance": (["data.npz", "--variance", "fixed_large"], {"variance": "fixed_large"}),
    "seed": (["data.npz", "--seed", "7"], {"seed": 7}),
    "count": (["data.npz", "--count", "3"], {"places": [0, 2, 4]}),
}


@pytest.mark.parametrize("case", CASES)
def test_bits_of_every_image(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, changed = CASES[case]
    assert main(["nll", *options, *QUICK, "--out", "out.csv"]) == 0
    places = changed.get("places", [*range(6)])
    want = wanted(**{"places": places} | changed)
    written = rows()
    assert [int(row["place"]) for row in written] == places
    # Six digits are written, and the model rounds otherwise in other batches.
    got = torch.tensor([float(row["total_bpd"]) for row in written])
    torch.testing.assert_close(got, want, rtol=2e-5, atol=0)
    shown = capsys.readouterr().out
    found = re.search(r"^bits/dim +(\S+) \+- (\S+)$", shown, flags=re.MULTILINE)
    assert found is not None
    error = float(want.std()) / len(want) ** 0.5
    assert [float(part) for part in found.groups()] == pytest.approx([float(want.mean()), error], rel=5e-2)
    assert ("given their labels" in shown) == changed.get("labelled", True)


def test_parts_add_up(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nll", "data.npz", *QUICK]) == 0
    means = dict(re.findall(r"^ *(\S+) +(\S+) \+- \S+$", capsys.readouterr().out, flags=re.MULTILINE))
    total = sum(float(means[name]) for name in ("prior", "steps", "decoder"))
    assert total == pytest.approx(float(means["bits/dim"]), rel=1e-4)


def test_a_model_without_classes_or_a_variance(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nll", "data.npz", "--model", "plain.safetensors", "--out", "out.csv"]) == 0
    shown = capsys.readouterr().out
    assert "without labels" in shown and "variance fixed_small" in shown
    assert [row["label"] for row in rows()] == [str(label) for label in LABELS]
    model = small_model(num_classes=0, learned_variance=False, prediction="v")
    want = wanted([*range(6)], labelled=False, model=model, variance="fixed_small", prediction="v")
    got = torch.tensor([float(row["total_bpd"]) for row in rows()])
    torch.testing.assert_close(got, want, rtol=2e-5, atol=0)


def test_threads(place: Path) -> None:
    with on_threads(1):
        assert main(["nll", "data.npz", *QUICK, "--count", "1", "--steps", "2", "--threads", "2"]) == 0
        assert torch.get_num_threads() == 2


def test_one_image_has_no_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nll", "data.npz", *QUICK, "--count", "1", "--steps", "2"]) == 0
    assert "+-" not in capsys.readouterr().out


def test_the_bundled_model_and_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nll", "mnist5k-held-out", "--count", "10", "--steps", "2", "--batch-size", "10"]) == 0
    assert "10 images of mnist5k-held-out, given their labels; 2 of 1000 timesteps" in capsys.readouterr().out


REFUSED = {
    "no-data": ([], "required: DATA"),
    "missing": (["none.npz"], r"no data at none\.npz"),
    "no-model": (["data.npz", "--model", "none"], "none"),
    "foreign-model": (["data.npz", "--model", "file"], "file is not a safetensors file"),
    "channels": (["colour.npz"], "images of colour.npz are 3 x 8 x 8 .*the model takes 1 x 8 x 8"),
    "size": (["wide.npz"], "images of wide.npz are 1 x 8 x 9 .*the model takes 1 x 8 x 8"),
    "labels": (["many.npz"], "labels go up to 3, and the model has 3 classes, 0 to 2: --unlabelled"),
    "steps": (["data.npz", "--steps", "0"], r"steps must lie in \[1, 12\]"),
    "many-steps": (["data.npz", "--steps", "13"], r"steps must lie in \[1, 12\]"),
    "timesteps": (["data.npz", "--timesteps", "bogus"], "is no spacing"),
    "variance": (["data.npz", "--variance", "bogus"], "invalid choice: 'bogus'"),
    "no-variance": (
        ["data.npz", "--model", "plain.safetensors", "--variance", "learned_range"],
        "no variance of its own",
    ),
    "batch": (["data.npz", "--batch-size", "0"], "--batch-size must be at least 1"),
    "count": (["data.npz", "--count", "0"], "--count must be at least 1"),
    "many": (["data.npz", "--count", "7"], "--count 7: there are 6 images"),
    "threads": (["data.npz", "--threads", "0"], "--threads must be from 1"),
    "no-gpu": (["data.npz", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    "meta": (["data.npz", "--device", "meta"], "device 'meta' cannot be used"),
    "suffix": (["data.npz", "--out", "x.txt"], r"--out must end in \.csv"),
    "folder": (["data.npz", "--out", "folder.csv"], r"folder\.csv is a folder"),
    "fifo": (["data.npz", "--out", "fifo.csv"], r"fifo\.csv is a"),
    "no-folder": (["data.npz", "--out", "missing/x.csv"], "no such folder: .*missing"),
    "unwritable": (["data.npz", "--out", "/proc/x.csv"], "no file can be made here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_model_is_called(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def uncalled(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be computed")

    monkeypatch.setattr(command, "nll", uncalled)
    options, message = REFUSED[case]
    before = sorted(os.listdir())
    try:
        status: Any = main(["nll", *(["--model", "model.safetensors"] if "--model" not in options else []), *options])
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr()
    assert status == 2 and not shown.out
    [line] = shown.err.splitlines()
    assert line.startswith("fastsample nll: ") and re.search(message, line), line
    assert sorted(os.listdir()) == before
