"""Reads a LoRA file or folder: its tensors and its statements about alpha, before any key is understood."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastsample.lora.files.config import LARGEST, PeftConfig, checked, parse
from fastsample.storage.pickles import load_pickle, state_dict_of
from fastsample.storage.reading import open_regular, regular_size

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# In the order of preference: of two forms of one file the safe one is read.
_NAMES = tuple(
    stem + suffix for suffix in (".safetensors", ".bin") for stem in ("pytorch_lora_weights", "adapter_model")
)
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Contents:
    """A source's tensors, unchecked, and its configurations.

    Attributes:
        name: what messages call the source.
        tensors: its values by key.
        configs: PEFT's configurations by component; the one at "" serves every component that has none itself.
    """

    name: str
    tensors: Mapping[Any, Any]
    configs: dict[str, PeftConfig]


def load(source: str | os.PathLike[str] | Mapping[str, Any]) -> Contents:
    """Opens a .safetensors file, a pickle of tensors (weights_only), a folder with one of them, or takes a state dict.

    Raises:
        FileNotFoundError: there is no such path.
        TypeError: source is none of these.
        ValueError: a file that cannot be read, or a folder that does not say which file is meant.
    """
    if isinstance(source, Mapping):
        return Contents("the state dict", source, {})
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be a path or a state dict, got {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        path = _sole_file(path)
    regular_size(path, "LoRA file")
    configs: dict[str, dict[str, Any]] = {}
    tensors: Mapping[Any, Any]
    if path.suffix == ".safetensors":
        tensors, configs = _safetensors(path)
    elif path.suffix in PICKLES:
        tensors = state_dict_of(load_pickle(path), path)
    else:
        raise ValueError(f"{path}: a LoRA file ends in .safetensors or one of {', '.join(PICKLES)}")
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and os.path.lexists(beside):
        with open_regular(beside) as file:
            configs = {"": parse(file.read(LARGEST + 1), str(beside))}
    return Contents(
        str(path), tensors, {component: checked(config, str(path)) for component, config in configs.items()}
    )


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


def _safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # get_tensor gives a view of the mapped file, and a later write to the file would change it.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118, it is no mapping
    except Exception as error:  # a dtype that torch does not have raises what its reader trips over
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if _METADATA not in metadata:
        return tensors, {}
    return tensors, _by_component(parse(metadata[_METADATA], f"{path}, {_METADATA}"))


def _by_component(metadata: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Configurations by component: a pipeline's saver writes "unet.r", "text_encoder.r", a single model's "r"."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in metadata.items():
        component, _, field = key.rpartition(".")
        configs.setdefault(component, {})[field] = value
    return configs
