"""Models on disk: a safetensors file whose metadata holds the shape and the schedule."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fastsample.schedule import Schedule
from fastsample.storage.writing import replacing
from fastsample.zoo.reading import read
from fastsample.zoo.unet import UNet, UNetConfig

_KEY = "fastsample_unet"


def save(model: UNet, path: str | Path) -> None:
    """Writes the model, replacing the file at once, so that readers never see half of one (storage.writing).

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
    about, tensors = read(path, "model", _KEY, "fastsample train")
    try:
        fields = json.loads(about)
        config, schedule = UNetConfig(**fields["config"]), Schedule.from_betas(fields["betas"])
        tensors = _renamed(tensors)
        _check_size(config, tensors)
        # Initial weights, soon overwritten, should not advance the caller's generator.
        with torch.random.fork_rng(devices=[]):
            model = UNet(config, schedule)
        model.load_state_dict(tensors)
    except (ArithmeticError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"{path} holds no model as its {_KEY!r} says: {type(error).__name__}: {reason}") from error
    return model.eval()


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under today's names: there was one module of each of these when two resolutions were all."""
    lists = {"down.": "downs.0.", "shrink.": "shrinks.0.", "grow.": "grows.0.", "up.": "ups.0."}
    start = {name: name.partition(".")[0] + "." for name in tensors}
    return {lists[old] + name[len(old) :] if (old := start[name]) in lists else name: tensors[name] for name in tensors}


def _check_size(config: UNetConfig, tensors: dict[str, Tensor]) -> None:
    """Raises where the model would be larger than the file: the size of every weight follows from these."""
    widths = config.widths
    wanted = {
        "embed_class.weight": (config.num_classes + 1, config.embedding),
        "enter.weight": (widths[0], config.fold**2 * config.channels, 3, 3),
    } | {f"shrinks.{i}.weight": (low, high, 3, 3) for i, (high, low) in enumerate(pairwise(widths))}
    if len(widths) == 1:
        wanted["middle_in.conv_in.weight"] = (widths[0], widths[0], 3, 3)
    for name, shape in wanted.items():
        if (actual := tuple(tensors[name].shape)) != shape:
            raise ValueError(f"{name} has shape {actual}, not {shape}")
