"""What is judged and what it is judged by: images as bytes, with their classes where those are known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsample.generation.folder import SETTINGS, Folder
from fastsample.images import to_uint8
from fastsample.train.data import MNIST5K, ImageData, load_data, read_npz

_FARTHEST = 2.0  # unclipped samples leave [-1, 1] a little; other ranges leave it by far
Source = str | Path | Tensor | ImageData


class Reference(NamedTuple):
    """Real images.

    Attributes:
        name: as it was given.
        data: those that distances are taken from.
        seen: those that a model may have been trained on, to find copies of them among samples.
        unseen: real ones that it was not trained on; None where nobody knows.
    """

    name: str
    data: ImageData
    seen: ImageData
    unseen: ImageData | None

    @property
    def digits(self) -> bool:
        """Whether these are handwritten digits, which the bundled classifier knows."""
        return self.unseen is not None


def load_reference(source: str | Path) -> Reference:
    """mnist5k, whose parts are known to be trained on or held out, or an .npz file or folder of images.

    Raises:
        As fastsample.train.load_data.
    """
    data = load_data(source)
    if str(source) in MNIST5K:
        return Reference(str(source), data, load_data("mnist5k-train"), load_data("mnist5k-held-out"))
    return Reference(str(source), data, data, None)


def load_samples(source: Source, labels: Tensor | None = None) -> ImageData:
    """Samples as a tensor, as ImageData, or from an .npz file or folder.

    Floating-point images are rounded to bytes, as one would save them: fastsample.to_uint8.

    Args:
        source: a tensor is (N, C, H, W), uint8 or floating point in [-1, 1]. The `images` of an .npz are (N, H, W) or
            (N, H, W, C), of either kind.
        labels: int64 (N,), in place of those that the source may have.

    Raises:
        ValueError, TypeError: for what is no set of images of one size, for floating-point images that are not
            finite or not in [-1, 1], and for labels that do not match.
        FileNotFoundError, ImportError: as fastsample.train.load_data.
    """
    if isinstance(source, ImageData):
        images, own = source.images, source.labels
    elif isinstance(source, Tensor):
        images, own = _bytes(source, "samples"), None
    elif Path(source).suffix == ".npz" and Path(source).is_file():
        images, own = _from_npz(Path(source))
    else:
        data = load_data(source)
        images, own = data.images, data.labels
    return ImageData(images, own if labels is None else labels)


def is_generated(source: Source) -> TypeGuard[str | Path]:
    """Whether this is a folder of fastsample generate."""
    return not isinstance(source, ImageData | Tensor) and (Path(source) / SETTINGS).is_file()


def generated_parts(path: str | Path, labels: Tensor | None = None) -> Iterator[ImageData]:
    """The samples in a folder of fastsample generate, chunk by chunk.

    Args:
        path: of the folder.
        labels: int64 (N,), in place of those of the chunks.

    Raises:
        ValueError: a chunk is missing or damaged, or the labels do not match.
    """
    folder = Folder.open(path)
    if labels is not None and len(labels) != folder.recipe.num:
        raise ValueError(f"labels must be {folder.recipe.num}, one per sample, got {len(labels)}")
    for chunk in folder.chunks():
        images = torch.from_numpy(chunk.images).permute(0, 3, 1, 2).contiguous()
        own = None if chunk.labels is None else torch.from_numpy(chunk.labels)
        asked = None if labels is None else labels[chunk.first : chunk.first + len(images)]
        yield ImageData(images, own if asked is None else asked)


def load_labels(path: Path) -> Tensor:
    """Classes from a file: the array `labels` of an .npz, an .npy, or whole numbers in a text; int64 (N,).

    Raises:
        FileNotFoundError: there is no such file. ValueError: there are no whole numbers in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--labels: no such file: {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                found = file["labels"]
        else:
            found = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, dtype=np.int64)
    except Exception as error:  # a broken file raises whatever its reader trips over
        raise ValueError(f"--labels: {path} holds no labels: {error}") from error
    if found.dtype.kind not in "iu" or found.ndim > 1:
        raise ValueError(f"--labels: {path} must hold a list of integers, got {found.dtype} of shape {found.shape}")
    return torch.from_numpy(found.astype(np.int64).reshape(-1))


def _from_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    images, labels = read_npz(path)
    if images.dtype.kind == "f":
        if images.ndim not in (3, 4):
            raise ValueError(f"{path}: images must be (N, H, W) or (N, H, W, C), got {images.shape}")
        first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        return _bytes(torch.from_numpy(first.astype(np.float32)), f"{path}: images"), _labels(labels)
    data = load_data(path)
    return data.images, data.labels


def _labels(labels: NDArray[np.integer] | None) -> Tensor | None:
    if labels is not None and labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    return None if labels is None else torch.from_numpy(labels.astype(np.int64))


def _bytes(images: Tensor, name: str) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"{name} must be uint8 or floating point, got {images.dtype}")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"{name} must be (N, C, H, W) with N > 0, got {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError(f"{name} hold NaN or infinite values")
    low, high = images.min().item(), images.max().item()
    if low >= 0 or max(-low, high) > _FARTHEST:
        raise ValueError(f"{name} must be uint8 or lie in [-1, 1], these lie in [{low:.3g}, {high:.3g}]")
    return to_uint8(images.cpu()).permute(0, 3, 1, 2).contiguous()
