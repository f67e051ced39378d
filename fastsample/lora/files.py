"""What lies in a LoRA file or folder: its tensors and what it says about alpha, before any key is understood."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastsample.lora.refused import refuse_config

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
        configs: PEFT's configurations by component; "" for one that serves every component without its own.
    """

    name: str
    tensors: Mapping[Any, Any]
    configs: dict[str, dict[str, Any]]


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
    if not path.exists():
        raise FileNotFoundError(f"no LoRA file at {path}")
    if path.is_dir():
        path = _sole_file(path)
    configs: dict[str, dict[str, Any]] = {}
    tensors: Mapping[Any, Any]
    if path.suffix == ".safetensors":
        tensors, configs = _safetensors(path)
    elif path.suffix in PICKLES:
        tensors = _pickle(path)
    else:
        raise ValueError(f"{path}: a LoRA file ends in .safetensors or one of {', '.join(PICKLES)}")
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and beside.is_file():
        configs = {"": _config(beside.read_bytes(), str(beside))}
    for config in configs.values():
        refuse_config(config, str(path))
    return Contents(str(path), tensors, configs)


def pattern_or(config: Mapping[str, Any], patterns: str, general: str, path: str, name: str) -> float | None:
    """What a PEFT configuration says of the module at `path`: a pattern's value, the general one, None for neither.

    As PEFT does it, a pattern matches the whole path or its end from a dot on, and the first to match counts.
    """
    value = config.get(general)
    for pattern, own in (config.get(patterns) or {}).items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as error:
            raise ValueError(f"{name}: {patterns} holds {pattern!r}, no regular expression: {error}") from None
        if matched:
            value = own
            break
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ):
        raise ValueError(f"{name}: {general} of {path} must be a finite number, got {value!r}")
    return value


def _sole_file(folder: Path) -> Path:
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise FileNotFoundError(f"no LoRA file in {folder}: it holds none of {', '.join(_NAMES)}, *.safetensors")
    names = ", ".join(path.name for path in found[:3])
    raise ValueError(f"{folder} holds {len(found)} safetensors files: {names}; name the one that is meant")


def _safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # get_tensor gives a view of the mapped file, and a later write to the file would change it.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118, it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if _METADATA not in metadata:
        return tensors, {}
    return tensors, _by_component(_config(metadata[_METADATA], f"{path}, {_METADATA}"))


def _by_component(metadata: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A pipeline's saver writes "unet.r", "text_encoder.r"; a model's own writes "r"."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in metadata.items():
        component, _, field = key.rpartition(".")
        configs.setdefault(component, {})[field] = value
    return configs


def _config(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{name} must hold an object, got {type(config).__name__}")
    return config


def _pickle(path: Path) -> Mapping[Any, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever its reader trips over
        # torch's own text goes on to advise weights_only=False.
        reasons = [line.strip() for line in str(error).splitlines() if re.search(r"\b(GLOBAL|Unsupported)\b", line)]
        reason = (
            reasons[0] if reasons else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        raise ValueError(
            f"{path} is refused: it is a pickle, and loading it as bare tensors (weights_only) failed: {reason}"
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a state dict")
    return found
