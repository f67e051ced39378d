"""Small sets of samples: models that processes of their own can load, and what tests ask of them."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsample import Schedule
from fastsample.generation import Chunk, Folder, generate, merge
from fastsample.generation.folder import Stored
from fastsample.zoo import UNet, UNetConfig

SMALL: dict[str, Any] = {"num": 23, "batch": 4, "model_batch": 3, "steps": 2, "seed": 7}
TEXT = "python:support.generated:unet"


def unet() -> UNet:
    """A model of three classes and RGB images, with the same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(
            UNetConfig(channels=3, image_size=(8, 6), num_classes=3, widths=(8, 16)), Schedule.cosine(100)
        ).eval()


def dying() -> UNet:
    """The same; of the processes that torchrun started the first one to call it twelve times is killed, once."""
    model, call, calls = unet(), UNet.forward, iter(range(11))
    marker = Path(os.environ["FASTSAMPLE_TEST_MARKER"])

    def forward(self: UNet, *arguments: Any, **keywords: Any) -> Tensor:
        if next(calls, None) is not None:
            return call(self, *arguments, **keywords)
        with suppress(FileExistsError):
            marker.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, *arguments, **keywords)

    model.forward = forward.__get__(model)  # type: ignore[method-assign]
    return model


def failing() -> UNet:
    """No model."""
    raise RuntimeError("no weights")


class Telling(torch.nn.Module):
    """Its output depends on the place in the batch and on the size of the batch, as rounding may in a real one."""

    schedule, prediction, num_classes = Schedule.cosine(100), "v", 3

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        place = torch.arange(len(x)) + 10.0 * len(x) + y + t / 100
        return torch.sin(x + place.reshape(-1, *(1,) * (x.ndim - 1)))


def merged(out: Path, model: Any = TEXT, **choices: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images and labels of a small set."""
    generate(model, out, progress=False, **{**SMALL, **choices})
    return arrays(out)


def chunks_alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks that were read are in memory, counted at every further one from now on."""
    images: list[weakref.ref[Any]] = []
    counts: list[int] = []
    get = Folder.get

    def counting(self: Folder, stored: Stored) -> Chunk:
        chunk = get(self, stored)
        images.append(weakref.ref(chunk.images))
        gc.collect()
        counts.append(sum(one() is not None for one in images))
        return chunk

    monkeypatch.setattr(Folder, "get", counting)
    return counts


def arrays(out: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images and labels in a folder."""
    file = out.with_suffix(".npz")
    merge(out, file)
    with np.load(file) as found:
        return found["arr_0"], found["arr_1"]
