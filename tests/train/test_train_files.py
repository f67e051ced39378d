"""A training's folder: one run at a time, planted links, odd checkpoints and models; and data that are bombs."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsample import zoo
from fastsample.storage.writing import sole_writer
from fastsample.train import ImageData, Settings, load_data, train

SMALL = Settings(steps=2, batch_size=2, warmup=1, timesteps=20, widths=(8, 16))
FILES = ("checkpoint.pt", "trunk.pt", "model.safetensors", "loss.csv", "loss.png")
IMAGES = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)


def data() -> ImageData:
    return ImageData(torch.from_numpy(IMAGES)[:, None])


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path) -> None:
    with sole_writer(tmp_path), pytest.raises(RuntimeError, match=f"{tmp_path} is in use by another run"):
        train(data(), tmp_path, SMALL, progress=False)
    assert not os.listdir(tmp_path)
    train(data(), tmp_path, SMALL, progress=False)
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)


def test_two_trainings_as_commands(tmp_path: Path) -> None:
    """Started together, on one folder, saving at every step: one trains, the other says why not in one line."""
    np.savez(tmp_path / "data.npz", images=IMAGES)
    small = "--batch-size 2 --widths 8 16 --timesteps 20 --save-every 1 --threads 1 --steps 100000"
    words = [sys.executable, "-m", "fastsample", "train", "--data", "data.npz", "--out", "run", *small.split()]
    runs = [
        subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        end = time.monotonic() + 60
        while all(run.poll() is None for run in runs) and time.monotonic() < end:
            time.sleep(0.05)
        [refused] = [run for run in runs if run.poll() is not None]
        [other] = [run for run in runs if run is not refused]
        assert refused.returncode == 2
        assert refused.stderr is not None
        assert (
            refused.stderr.read()
            == "fastsample train: run is in use by another run: wait for its end or name another folder\n"
        )
        while not (tmp_path / "run" / "loss.csv").exists() and time.monotonic() < end:
            time.sleep(0.05)
        other.send_signal(signal.SIGKILL)
        other.wait(10)
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    assert zoo.load(tmp_path / "run" / "model.safetensors").config.widths == (8, 16)


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.pt.0123.part").write_bytes(b"half")
    train(data(), tmp_path, SMALL, progress=False)
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    precious, out = tmp_path / "precious", tmp_path / "run"
    precious.write_text("precious")
    out.mkdir()
    for name in FILES[2:]:
        (out / name).symlink_to(precious)
    for name in FILES:
        (out / f"{name}.part").symlink_to(precious)
    for name in FILES[:2]:
        (out / name).symlink_to(tmp_path / "nowhere")
    train(data(), out, SMALL, progress=False)
    assert precious.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert not any((out / name).is_symlink() for name in FILES)


def test_save_does_not_follow_links_or_leave_parts(tmp_path: Path) -> None:
    model = zoo.digits()
    (tmp_path / "precious").write_text("precious")
    for name in ("m.safetensors", "m.safetensors.part"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    zoo.save(model, tmp_path / "m.safetensors")
    zoo.save(model, str(tmp_path / "m.safetensors"))
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "m.safetensors.part", "precious"]


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no-model": lambda state: state.pop("model"),
    "model": lambda state: state["model"].popitem(),
    "model-type": lambda state: state.update(model=3),
    "average": lambda state: state["average"].update(odd=torch.zeros(1)),
    "optimizer": lambda state: state["optimizer"].pop("param_groups"),
    "history": lambda state: state.update(history=[(1.0, 2.0, 3.0)]),
    "history-shape": lambda state: state.update(history=torch.zeros(2, 2)),
    "steps": lambda state: state.pop("steps"),
    "timestep-sampler": lambda state: state.update(timestep_sampler={"losses": 3}),
    "history-type": lambda state: state.update(history=3),
}


def test_odd_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    train(data(), tmp_path, SMALL, progress=False)
    whole = torch.load(path, weights_only=True)
    for change in CHANGES.values():
        state = copy.deepcopy(whole)
        change(state)
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is no whole checkpoint") as caught:
            train(data(), tmp_path, SMALL, progress=False)
        assert "\n" not in str(caught.value)


ABOUTS = {
    "no-json": "{",
    "list": "[]",
    "no-betas": '{"config": {}}',
    "field": '{"config": {"odd": 1}, "betas": [0.5]}',
    "text": '{"config": {"image_size": "28"}, "betas": [0.5]}',
    "betas": '{"config": {}, "betas": ["a"]}',
    "deep": "[" * 100_000,
    "huge": '{"config": {"widths": [800000, 800000]}, "betas": [0.5]}',
    "classes": '{"config": {"num_classes": 1000000000000}, "betas": [0.5]}',
    "larger": '{"config": {"widths": [480, 960]}, "betas": [0.5]}',
}


@pytest.mark.parametrize("name", ABOUTS)
def test_models_that_describe_themselves_oddly(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "m.safetensors"
    save_file(
        {name: value.contiguous() for name, value in zoo.digits().state_dict().items()},
        path,
        metadata={"fastsample_unet": ABOUTS[name]},
    )
    with pytest.raises(ValueError, match=r"m\.safetensors holds no model as its"):
        zoo.load(path)


def test_a_model_that_is_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="a FIFO"):
        zoo.load(tmp_path / "m.safetensors")


def _npy(shape: tuple[int, ...], content: bytes = b"", dtype: str = "|u1", version: int = 1) -> bytes:
    """An array that is said to have this shape."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2, "little") + text + content


def _zip(path: Path, compression: int = zipfile.ZIP_DEFLATED, **arrays: bytes) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)


GOOD = _npy((2, 8, 8), bytes(128))
NPZ: dict[str, Callable[[Path], object]] = {
    "bomb": lambda path: _zip(path, images=_npy((70, 1024, 1024), bytes(70 << 20))),
    "bomb-of-labels": lambda path: _zip(path, images=GOOD, labels=_npy((70 << 20,), bytes(70 << 20))),
    "shape": lambda path: _zip(path, images=_npy((1 << 40, 8, 8), bytes(64))),
    "objects": lambda path: _zip(path, images=_npy((2,), b"x" * 16, "|O")),
    "version": lambda path: _zip(path, images=_npy((2, 8, 8), bytes(128), version=9)),
    "no-header": lambda path: _zip(path, images=b"junk"),
    "header": lambda path: _zip(path, images=b"\x93NUMPY\x01\x00\x04\x00abc\n"),
    "half": lambda path: path.write_bytes(path.read_bytes()[:-300] + path.read_bytes()[-200:]),
    "checksum": lambda path: path.write_bytes(path.read_bytes().replace(bytes(60), bytes(59) + b"1", 1)),
}


@pytest.mark.parametrize("kind", NPZ)
def test_npz_that_are_bombs_or_broken(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    _zip(path, zipfile.ZIP_STORED, images=GOOD)
    assert load_data(path).images.shape == (2, 1, 8, 8)
    NPZ[kind](path)
    with pytest.raises(ValueError, match=r"a\.npz"):
        load_data(path)


def test_labels_that_would_make_a_huge_model() -> None:
    with pytest.raises(ValueError, match=r"labels must be below 100000, got 1000000000000"):
        ImageData(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.tensor([10**12]))


def _flat_images(folder: Path) -> None:
    from PIL import Image

    for i in range(2):
        Image.new("1", (6000, 6000)).save(folder / f"{i}.png")


def _postscript(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")


IMAGE_FOLDERS: dict[str, Callable[[Path], object]] = {
    "bomb": _flat_images,
    "postscript": _postscript,
    "junk": lambda folder: (folder / "a.png").write_bytes(b"junk"),
    "empty": lambda folder: (folder / "a.png").touch(),
    "fifo": lambda folder: os.mkfifo(folder / "a.png"),
    "loop": lambda folder: (folder / "a.png").symlink_to(folder / "a.png"),
    "loop-of-folders": lambda folder: (folder / "a").symlink_to(folder),
}


@pytest.mark.parametrize("kind", IMAGE_FOLDERS)
def test_folders_of_images_that_are_none(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    IMAGE_FOLDERS[kind](tmp_path)
    with pytest.raises(ValueError, match=r"would unpack|cannot be read as an image|holds no images"):
        load_data(tmp_path)
