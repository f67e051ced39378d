"""Models on disk: a safetensors file whose metadata holds the shape and the schedule."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from fastsample.schedule import Schedule
from fastsample.zoo.unet import UNet, UNetConfig

_KEY = "fastsample_unet"


def save(model: UNet, path: str | Path) -> None:
    """Writes the model, replacing the file at once, so that readers never see half of one."""
    about = {"config": asdict(model.config), "betas": model.schedule.betas.tolist()}
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_bytes(safetensors.torch.save(tensors, metadata={_KEY: json.dumps(about)}))
    os.replace(part, path)


def load(path: str | Path) -> UNet:
    """The model that save wrote, or `fastsample train`, on the CPU and in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model at {path}" + (": name the .safetensors file in it" if path.is_dir() else ""))
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(_KEY)
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if about is None:
        raise ValueError(f"{path} was not made by fastsample train: its metadata lacks {_KEY!r}")
    fields = json.loads(about)
    with torch.random.fork_rng(devices=[]):  # initial weights, soon overwritten, should not advance the caller's RNG
        model = UNet(UNetConfig(**fields["config"]), Schedule.from_betas(fields["betas"]))
    model.load_state_dict(tensors)
    return model.eval()
