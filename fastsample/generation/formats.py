"""How chunks look on disk. The same chunk gives the same bytes, so that it may be written twice."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsample.generation.chunk import Chunk

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that zip files know
_CHANNELS = (1, 3, 4)
_LABELS = "labels.json"
Files = dict[str, bytes]


class Format(NamedTuple):
    """A format of chunks.

    Attributes:
        suffix: of a chunk's name; "" where it is a folder.
        encode: a chunk's files by name; a single one is named "".
        decode: the images and labels of a chunk at a path.
        pictures: whether images must have 1, 3 or 4 channels.
    """

    suffix: str
    encode: Callable[[Chunk], Files]
    decode: Callable[[Path], tuple[NDArray[np.uint8], NDArray[np.int64] | None]]
    pictures: bool = False


def write_arrays(file: Any, arrays: Mapping[str, Callable[[Any], None]]) -> None:
    """Writes an .npz file, of each array what its function writes: bytes that depend on nothing else."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, write in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as member:
                write(member)


def _named(chunk: Chunk, images: str, labels: str) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {images: np.ascontiguousarray(chunk.images)}
    return arrays if chunk.labels is None else arrays | {labels: np.ascontiguousarray(chunk.labels)}


def _to_npz(chunk: Chunk) -> Files:
    def writer(array: NDArray[Any]) -> Callable[[Any], None]:
        return lambda member: np.lib.format.write_array(member, array, allow_pickle=False)

    file = io.BytesIO()
    write_arrays(file, {name: writer(array) for name, array in _named(chunk, "arr_0", "arr_1").items()})
    return {"": file.getvalue()}


def _of_npz(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"] if "arr_1" in file.files else None


def _to_safetensors(chunk: Chunk) -> Files:
    from safetensors.numpy import save

    return {"": save(_named(chunk, "images", "labels"), metadata={"first": str(chunk.first)})}


def _of_safetensors(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    from safetensors.numpy import load_file

    tensors = load_file(path)
    return tensors["images"], tensors.get("labels")


def _key(place: int) -> str:
    return f"{place:012d}"


def _png(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="PNG")
    return file.getvalue()


def _pixels(data: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        pixels = np.asarray(image, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _to_pngs(chunk: Chunk) -> Files:
    files = {f"{_key(chunk.first + i)}.png": _png(image) for i, image in enumerate(chunk.images)}
    if chunk.labels is not None:
        files[_LABELS] = json.dumps(chunk.labels.tolist()).encode()
    return files


def _of_pngs(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    images = np.stack([_pixels(file.read_bytes()) for file in sorted(path.glob("*.png"))])
    labels = path / _LABELS
    return images, np.array(json.loads(labels.read_text()), dtype=np.int64) if labels.is_file() else None


def _to_tar(chunk: Chunk) -> Files:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for i, image in enumerate(chunk.images):
            parts = {"png": _png(image)}
            if chunk.labels is not None:
                parts["cls"] = str(chunk.labels[i]).encode()
            for suffix, data in parts.items():
                entry = tarfile.TarInfo(f"{_key(chunk.first + i)}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return {"": file.getvalue()}


def _of_tar(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    images, labels = [], []
    with tarfile.open(path, mode="r:") as archive:
        for entry in archive:
            member = archive.extractfile(entry)
            assert member is not None
            data = member.read()
            if entry.name.endswith(".png"):
                images.append(_pixels(data))
            else:
                labels.append(int(data))
    return np.stack(images), np.array(labels, dtype=np.int64) if labels else None


FORMATS = {
    "npz": Format(".npz", _to_npz, _of_npz),
    "png": Format("", _to_pngs, _of_pngs, pictures=True),
    "safetensors": Format(".safetensors", _to_safetensors, _of_safetensors),
    "webdataset": Format(".tar", _to_tar, _of_tar, pictures=True),
}


def check_pictures(format: str, channels: int) -> None:
    """Raises where images of so many channels cannot be written in this format, or Pillow is needed and missing."""
    if not FORMATS[format].pictures:
        return
    if channels not in _CHANNELS:
        raise ValueError(f"format {format!r} is for images of 1, 3 or 4 channels, these have {channels}")
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(f"format {format!r} needs Pillow: pip install pillow") from error
