"""save_grid: where every image goes, the file's bytes as another reader sees them, and what is refused."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fastsample import ops, save_grid, to_uint8


def pixels(path: Path) -> NDArray[np.uint8]:
    """(height, width, C) as Pillow reads it."""
    with Image.open(path) as image:
        read = np.asarray(image)
    return read[..., None] if read.ndim == 2 else read


def samples(batch: int = 7, channels: int = 3) -> torch.Tensor:
    return ops.randn((batch, channels, 5, 4), seed=0) * 0.4


# (batch, columns) to (down, across): by itself the least square that holds all.
LAYOUTS = {
    (1, None): (1, 1),
    (2, None): (1, 2),
    (4, None): (2, 2),
    (5, None): (2, 3),
    (10, None): (3, 4),
    (7, 1): (7, 1),
    (7, 3): (3, 3),
    (7, 7): (1, 7),
    (7, 100): (1, 7),
}


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_image_has_its_place(layout: tuple[int, int | None], channels: int, padding: int, tmp_path: Path) -> None:
    batch, columns = layout
    x = samples(batch, channels)
    save_grid(x, tmp_path / "a.png", columns=columns, padding=padding)
    got, images = pixels(tmp_path / "a.png"), to_uint8(x).numpy()
    down, across = LAYOUTS[layout]
    want = np.full((down * (5 + padding) - padding, across * (4 + padding) - padding, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // across * (5 + padding), i % across * (4 + padding)
        want[top : top + 5, left : left + 4] = image
    assert np.array_equal(got, want)


@pytest.mark.parametrize(
    ("value_range", "values", "levels"),
    [
        pytest.param((0, 1), [0.0, 0.2, 1.0, 2.0, -1.0], [0, 51, 255, 255, 0], id="unit"),
        pytest.param((-2.0, 3.0), [-2.0, -1.0, 3.0, float("nan"), float("inf")], [0, 51, 255, 0, 255], id="odd"),
        pytest.param(torch.tensor([0, 255]), [0.0, 1.0, 51.0, 254.0, 255.0], [0, 1, 51, 254, 255], id="bytes"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_value_range(
    value_range: Any, values: list[float], levels: list[int], dtype: torch.dtype, tmp_path: Path
) -> None:
    x = torch.tensor(values, dtype=dtype).reshape(1, 1, 1, 5)
    save_grid(x, tmp_path / "a.png", value_range=value_range)
    # bfloat16 holds 0.2 to 2^-10, which is a quarter of a level.
    assert pixels(tmp_path / "a.png").flatten().tolist() == levels


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".PNG"])
def test_the_end_of_the_path_says_the_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    save_grid(torch.zeros(3, 3, 8, 9), str(path), padding=0)
    with Image.open(path) as image:
        assert image.format == {".webp": "WEBP", ".PNG": "PNG"}.get(suffix, "JPEG")
        assert image.size == (18, 16)


@pytest.mark.parametrize("kind", ["strided", "gradients", "inference"])
def test_samples_of_any_kind(kind: str, tmp_path: Path) -> None:
    x = samples()
    save_grid(x, tmp_path / "want.png")
    given = {
        "strided": x.to(memory_format=torch.channels_last),
        "gradients": x.clone().requires_grad_(),
    }.get(kind)
    if given is None:
        with torch.inference_mode():
            given = x.clone()
    save_grid(given, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "want.png").read_bytes()
    assert torch.equal(x, samples())


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no-batch": ({"samples": torch.zeros(3, 4, 4)}, ValueError, "samples must be"),
    "none": ({"samples": torch.zeros(0, 3, 4, 4)}, ValueError, "nothing zero"),
    "latents": ({"samples": torch.zeros(1, 4, 4, 4)}, ValueError, "latents are to be decoded"),
    "bytes": ({"samples": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, TypeError, "samples must be"),
    "numpy": ({"samples": np.zeros((1, 3, 4, 4))}, TypeError, "samples must be"),
    "columns": ({"columns": 0}, ValueError, "columns must be at least 1"),
    "columns-float": ({"columns": 2.0}, TypeError, "columns must be an int"),
    "padding": ({"padding": -1}, ValueError, "padding must be at least 0"),
    "padding-huge": ({"padding": 2**31}, ValueError, "padding of"),
    "range": ({"value_range": (1.0, -1.0)}, ValueError, "value_range"),
    "range-empty": ({"value_range": (1.0, 1.0)}, ValueError, "value_range"),
    "range-nan": ({"value_range": (float("nan"), 1.0)}, ValueError, "value_range"),
    "range-one": ({"value_range": 1.0}, ValueError, "value_range"),
    "range-text": ({"value_range": "01"}, ValueError, "value_range"),
    "format": ({"path": "a.bogus"}, ValueError, r"path must end in one of \.png"),
    "no-format": ({"path": "a"}, ValueError, "path must end in"),
    "path": ({"path": 3}, TypeError, "path must be a str"),
    "folder": ({"path": "folder.png"}, ValueError, "is a folder"),
    "no-folder": ({"path": "missing/a.png"}, FileNotFoundError, r"missing/a\.png"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_and_writes_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    given, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        save_grid(**{"samples": samples(), "path": "a.png"} | given)
    assert os.listdir() == ["folder.png"]


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    save_grid(samples(), tmp_path / "a.png")
    with pytest.raises(ImportError, match="pip install pillow"):
        save_grid(samples(), tmp_path / "a.jpg")
    assert os.listdir(tmp_path) == ["a.png"]


def test_what_is_there_stays_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a.png").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"a\.png"):
        save_grid(samples(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text() == "old" and os.listdir(tmp_path) == ["a.png"]


def test_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a.png").symlink_to("file")
    save_grid(samples(), tmp_path / "a.png")
    assert not (tmp_path / "a.png").is_symlink() and (tmp_path / "file").read_bytes() == b""
