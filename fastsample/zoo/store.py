"""Models on disk: a safetensors file whose metadata holds the shape and the schedule."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from fastsample.files import regular_size, replacing
from fastsample.schedule import Schedule
from fastsample.zoo.unet import UNet, UNetConfig

_KEY = "fastsample_unet"


def save(model: UNet, path: str | Path) -> None:
    """Writes the model, replacing the file at once, so that readers never see half of one; see files.replacing.

    Raises:
        OSError: it cannot be written. ValueError: there is a folder or a device. What was there stays.
    """
    about = {"config": asdict(model.config), "betas": model.schedule.betas.tolist()}
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as file:
        file.write(safetensors.torch.save(tensors, metadata={_KEY: json.dumps(about)}))


def load(path: str | Path) -> UNet:
    """The model that save wrote, or `fastsample train`, on the CPU and in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such model.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"no model at {path}: name the .safetensors file in it")
    regular_size(path, "model")
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(_KEY)
        tensors = safetensors.torch.load_file(path)
    except Exception as error:  # a dtype that torch does not have raises what its reader trips over
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if about is None:
        raise ValueError(f"{path} was not made by fastsample train: its metadata lacks {_KEY!r}")
    with torch.random.fork_rng(devices=[]):  # initial weights, soon overwritten, should not advance the caller's RNG
        model = _fitting(path, about, tensors)
    model.load_state_dict(tensors)
    return model.eval()


def _fitting(path: Path, about: str, tensors: dict[str, Tensor]) -> UNet:
    """The model that a file describes, which is as large as the file's weights."""
    try:
        fields = json.loads(about)
        config, schedule = UNetConfig(**fields["config"]), Schedule.from_betas(fields["betas"])
        # Without memory: a description may say anything.
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in UNet(config, schedule).state_dict().items()}
    except (ArithmeticError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no model in {_KEY!r}: {type(error).__name__}: {error}") from error
    if shapes != (found := {name: value.shape for name, value in tensors.items()}):
        odd = next(iter({name for name, _ in shapes.items() ^ found.items()}))
        raise ValueError(f"{path} holds other weights than its {_KEY!r} says, such as {odd[:200]}")
    return UNet(config, schedule)
