"""LoRA files of every generation, read into one list of low-rank factors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from fastsample.checks import not_a_tensor
from fastsample.lora.files.reading import Contents, load
from fastsample.lora.files.refused import first_few, refuse_keys

__all__ = ["Entry", "read"]

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA = {
    "unet": "unet",
    "transformer": "transformer",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}
_KOHYA_STEM = re.compile(rf"lora_({'|'.join(_KOHYA)})_(.+)")
_WRAPPERS = ("base_model.model.", "model.diffusion_model.", "diffusion_model.")
# What follows a module's name: the generation's mark, the half, PEFT's adapter name.
_FACTOR = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?P<peft>[AB])(?:\.(?P<adapter>[^.]+))?"
    r"|\.lora_(?P<kohya>down|up)"
    r"|(?P<mark>\.lora|_lora|\.lora_linear_layer)\.(?P<diffusers>down|up)"
    r")\.weight"
)
_ALPHA = re.compile(r"(?P<stem>.+?)(?P<mark>\.lora|_lora|\.lora_linear_layer)?\.alpha")
_LONGEST_KEY = 1000
_HALVES = {"A": "down", "B": "up", "down": "down", "up": "up"}


@dataclass(frozen=True, eq=False)
class Entry:
    """One adapted layer as a file has it: the layer's weight gets factor * up @ down.

    Attributes:
        key: what the file calls it, the common beginning of its keys.
        component: "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", or "" where the file does
            not say.
        path: the module's path without component and wrappers, with dots, or as kohya writes it.
        flat: path is kohya's: an underscore may stand for a dot.
        down: A, shape (r, in), or (r, in, kh, kw) of a convolution.
        up: B, shape (out, r), or (out, r, 1, 1) of a convolution.
        factor: alpha / r; alpha / sqrt(r) for rank-stabilised LoRA; 1 where the file gives no alpha.
    """

    key: str
    component: str
    path: str
    flat: bool
    down: Tensor
    up: Tensor
    factor: float


@dataclass
class _Parts:
    """The values of one stem, each with its own key."""

    values: dict[str, tuple[str, Any]] = field(default_factory=dict)
    kohya: bool = False
    mark: str = ""

    def put(self, half: str, key: str, value: object, name: str) -> None:
        if half in self.values:
            raise ValueError(f"{name}: {self.values[half][0]} and {key} are the same factor of one module")
        self.values[half] = key, value


def read(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> list[Entry]:
    """Reads the LoRA of a file, a folder or a state dict; tensors of a state dict are taken as they are, not copied.

    Every generation of keys is known: PEFT's (X.lora_A.weight, with or without an adapter's name), diffusers'
    (X.lora.down.weight, X_lora.down.weight, X.lora_linear_layer.down.weight) and kohya's, which is LCM-LoRA's as well
    (lora_unet_X.lora_down.weight).

    A module's alpha is the value at its key X.alpha (0 counts as absent, as in kohya's scripts), else what
    adapter_config.json or the safetensors metadata say, else r.

    Args:
        source: a .safetensors file; a .bin, .pt, .pth or .ckpt file that torch.load(weights_only=True) takes; a folder
            with pytorch_lora_weights.safetensors, or adapter_model.safetensors and adapter_config.json, or a sole
            .safetensors file; a state dict.

    Returns:
        One Entry per adapted layer, in the file's order.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        TypeError: source is no path and no mapping, or a state dict's key or value of another type.
        ValueError: a file that cannot be read or holds no LoRA; DoRA, LoHa, LoKr and other kinds, by name, with the
            first keys; keys of no known form; a factor without the other; factors that hold NaN or infinity, are no
            floating-point numbers or do not fit each other or the rank that the file states.

    Example:
        >>> down, up = torch.ones(2, 3), torch.ones(5, 2)
        >>> state = {"unet.mid.to_out.0.lora_A.weight": down, "unet.mid.to_out.0.lora_B.weight": up}
        >>> [(entry.component, entry.path, entry.factor) for entry in read(state)]
        [('unet', 'mid.to_out.0', 1.0)]
        >>> state = {"lora_unet_mid_to_q.lora_down.weight": down, "lora_unet_mid_to_q.lora_up.weight": up}
        >>> [(entry.path, entry.factor) for entry in read({**state, "lora_unet_mid_to_q.alpha": torch.tensor(8.0)})]
        [('mid_to_q', 4.0)]
    """
    try:
        return _read(load(source))
    except TypeError as error:
        if isinstance(source, str | os.PathLike):  # a file's contents are no argument of the caller's
            raise ValueError(str(error)) from None
        raise


def _read(contents: Contents) -> list[Entry]:
    name = contents.name
    if not contents.tensors:
        raise ValueError(f"{name} is empty")
    for key in contents.tensors:
        if not isinstance(key, str):
            raise TypeError(f"{name}: keys must be strings, got {short(key)}")
        if len(key) > _LONGEST_KEY:
            raise ValueError(f"{name}: the key {short(key)} has {len(key)} letters, at most {_LONGEST_KEY} are read")
    refuse_keys(contents.tensors, name)
    return [_entry(stem, parts, contents) for stem, parts in _grouped(contents).items()]


def _grouped(contents: Contents) -> dict[str, _Parts]:
    """The values by stem."""
    grouped: dict[str, _Parts] = {}
    unknown: list[str] = []
    adapters: dict[str, str] = {}
    for key, value in contents.tensors.items():
        if match := _FACTOR.fullmatch(key):
            parts = grouped.setdefault(match["stem"], _Parts())
            if match["adapter"]:
                adapters.setdefault(match["adapter"], key)
            if len(adapters) > 1:
                raise ValueError(f"{contents.name} holds several adapters: {', '.join(adapters.values())}")
            parts.kohya = bool(match["kohya"])
            parts.mark = match["mark"] or ""
            parts.put(_HALVES[match["peft"] or match["kohya"] or match["diffusers"]], key, value, contents.name)
        elif match := _ALPHA.fullmatch(key):
            grouped.setdefault(match["stem"], _Parts()).put("alpha", key, value, contents.name)
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{contents.name} holds {len(unknown)} keys that are no LoRA's: {first_few(unknown)}")
    return grouped


def _entry(stem: str, parts: _Parts, contents: Contents) -> Entry:
    name = contents.name
    for half, other in (("down", "up"), ("up", "down")):
        if half not in parts.values:
            key = parts.values[other if other in parts.values else "alpha"][0]
            raise ValueError(f"{name}: {key} has no {half} factor beside it")
    down, up = (_checked(*parts.values[half], name) for half in ("down", "up"))
    _check_shapes(parts.values["down"][0], down, parts.values["up"][0], up, name)
    component, path, flat = _component_and_path(stem, parts)
    return Entry(stem, component, path, flat, down, up, _factor(component, path, len(down), parts, contents))


def _component_and_path(stem: str, parts: _Parts) -> tuple[str, str, bool]:
    """The component, the module's path, and whether the path is kohya's."""
    if match := _KOHYA_STEM.fullmatch(stem):
        return _KOHYA[match[1]], match[2], True
    component, path = _strip(stem)
    if parts.kohya and "." not in path:
        return component, path, True
    if parts.mark:
        path = _modern(path, parts.mark)
    return component, path, False


def _strip(path: str) -> tuple[str, str]:
    component = ""
    while True:
        head, _, rest = path.partition(".")
        wrapper = next((known for known in _WRAPPERS if path.startswith(known) and path != known), None)
        if wrapper is not None:
            path = path.removeprefix(wrapper)
        elif not component and rest and head in COMPONENTS:
            component, path = head, rest
        else:
            return component, path


def _modern(path: str, mark: str) -> str:
    """The module that an attention processor's layer stood for; a text encoder's layers once had the UNet's names."""
    path = path.replace(".processor.", ".")
    if mark != "_lora":
        return path
    parent, _, last = path.rpartition(".")
    if parent.endswith("self_attn") and last.startswith("to_"):
        last = f"{last.removeprefix('to_')}_proj"
    elif last == "to_out":
        last = "to_out.0"
    return f"{parent}.{last}" if parent else last


def _checked(key: str, value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise not_a_tensor(f"{name}: {key}", value)
    if not value.is_floating_point():
        raise ValueError(f"{name}: {key} must hold floating-point numbers, got {value.dtype}")
    if value.is_meta or value.layout != torch.strided:
        raise ValueError(f"{name}: {key} must be a dense tensor with values, got {value.layout} on {value.device}")
    # An axis without a stride repeats one value, and may be longer than memory.
    values = value.detach()[tuple(slice(None if step else 1) for step in value.stride())]
    # The 8-bit formats know no isfinite.
    values = values if value.element_size() > 1 else values.float()
    if not values.isfinite().all():
        raise ValueError(f"{name}: {key} holds NaN or infinity")
    return value


def _check_shapes(down_key: str, down: Tensor, up_key: str, up: Tensor, name: str) -> None:
    shapes = f"{name}: {down_key} has shape {tuple(down.shape)}, {up_key} {tuple(up.shape)}"
    if down.ndim not in (2, 4) or up.ndim != down.ndim:
        raise ValueError(f"{shapes}; a linear's have two axes each, a 2-D convolution's four")
    if down.numel() == 0 or up.numel() == 0:
        raise ValueError(f"{shapes}; an axis is empty")
    if up.shape[1] != down.shape[0] or any(size != 1 for size in up.shape[2:]):
        raise ValueError(
            f"{shapes}; they must be (r, in, ...) and (out, r, ...), the latter without a kernel of its own"
        )


def _factor(component: str, path: str, rank: int, parts: _Parts, contents: Contents) -> float:
    name = contents.name
    if "alpha" in parts.values:
        return (_number(*parts.values["alpha"], name) or rank) / rank
    config = contents.configs.get(component)
    if config is None and (config := contents.configs.get("")) is not None:
        # The patterns of a configuration without component match the whole path.
        path = f"{component}.{path}" if component else path
    if config is None:
        return 1.0
    alpha, stated = config.alpha_of(path), config.rank_of(path)
    if stated not in (None, rank):
        raise ValueError(f"{name}: {path} has rank {rank}, its configuration says {stated}")
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.stabilised else rank)


def _number(key: str, value: object, name: str) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.is_meta or value.layout != torch.strided:
            raise ValueError(f"{name}: {key} must be one number, got {value.dtype} of shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: {key} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: {key} is {number}, no finite number")
    return number
