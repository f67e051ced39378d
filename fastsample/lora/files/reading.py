"""Reads a LoRA file or folder: its tensors and its statements about alpha, before any key is understood."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from fastsample.lora.files.config import LARGEST, Configs, checked, parse
from fastsample.lora.files.header import objects_of, values_of
from fastsample.lora.files.live import adapter_of
from fastsample.storage.pickles import load_pickle, state_dict_of
from fastsample.storage.reading import open_regular, regular_size

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# In the order of preference: of two forms of one file the safe one is read.
_NAMES = tuple(
    stem + suffix for suffix in (".safetensors", ".bin") for stem in ("pytorch_lora_weights", "adapter_model")
)
_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Contents:
    """A source's tensors, unchecked, and its configurations.

    Attributes:
        name: what messages call the source.
        tensors: its values by key.
        configs: PEFT's configurations; the first in the order that states an alpha counts.
        later: makes further ones, which are asked for where those state nothing.
        factors: by stem, where the source is a model that has them in its layers.
    """

    name: str
    tensors: Mapping[Any, Any]
    configs: list[Configs] = field(default_factory=list)
    later: Callable[[], list[Configs]] = list
    factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def beside(self) -> list[str]:
        """What the configurations ask for beside low-rank pairs."""
        return list(dict.fromkeys(what for configs in self.configs for one in configs.values() for what in one.beside))


def load(source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module) -> Contents:
    """Opens a .safetensors file, a pickle of tensors (weights_only), a folder with one of them, or takes a state dict.

    Raises:
        FileNotFoundError: there is no such path.
        TypeError: source is none of these, nor a model with PEFT's adapters.
        ValueError: a file that cannot be read, a folder that does not say which file is meant, or a model with several
            adapters of which not one is active.
    """
    if isinstance(source, nn.Module):
        return _live(source)
    if isinstance(source, Mapping):
        return Contents("the state dict", source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be a path, a state dict or a PEFT model, got {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        path = _sole_file(path)
    regular_size(path, "LoRA file")
    header: Mapping[str, str] = {}
    tensors: Mapping[Any, Any]
    if path.suffix == ".safetensors":
        tensors, header = _safetensors(path)
    elif path.suffix in PICKLES:
        tensors = state_dict_of(load_pickle(path), path)
    else:
        raise ValueError(f"{path}: a LoRA file ends in .safetensors or one of {', '.join(PICKLES)}")
    name, own = str(path), objects_of(header, str(path))
    if path.stem == "adapter_model":  # PEFT writes both files at once
        return Contents(name, tensors, [*_beside(path), *own], lambda: values_of(header, name))
    return Contents(name, tensors, own, lambda: [*values_of(header, name), *_beside(path)])


def _live(model: nn.Module) -> Contents:
    adapter = adapter_of(model)
    name = f"the {type(model).__name__}"
    config = {"": checked(adapter.config, name, f"the configuration of {name}")}
    return Contents(name, adapter.tensors, [config], factors=adapter.factors)


def _beside(path: Path) -> list[Configs]:
    """PEFT's configuration that stands beside a file."""
    beside = path.with_name(_CONFIG)
    if not os.path.lexists(beside):
        return []
    with open_regular(beside) as file:
        config = parse(file.read(LARGEST + 1), str(beside))
    return [{"": checked(config, f"{path}, {_CONFIG}", _CONFIG)}]


def _sole_file(folder: Path) -> Path:
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) == 1:
        return paths[0]
    if not paths:
        raise FileNotFoundError(f"no LoRA file in {folder}: it holds none of {', '.join(_NAMES)}, *.safetensors")
    names = ", ".join(path.name for path in paths[:3])
    raise ValueError(f"{folder} holds {len(paths)} safetensors files: {names}; name the one that is meant")


def _safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            # get_tensor gives a view of the mapped file, and a later write to the file would change it.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118, it is no mapping
            return tensors, file.metadata() or {}
    except Exception as error:  # a dtype that torch does not have raises what its reader trips over
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
