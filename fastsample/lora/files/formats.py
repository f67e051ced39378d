"""LoRA files of every generation, read into one list of low-rank factors."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor, nn

from fastsample.checks import not_a_tensor
from fastsample.lora.files.prefixes import split, split_flat
from fastsample.lora.files.reading import Contents, load
from fastsample.lora.files.refused import UnfitError, kind_of
from fastsample.lora.files.scales import NO_ALPHA, Scales

__all__ = ["Entry", "Left", "LoraFile", "read"]

# What follows a module's name: the generation's mark, the half, PEFT's adapter name.
_FACTOR = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?:(?P<peft>[AB])|(?P<kohya>down|up))(?:\.(?P<adapter>[^.]+))?"
    r"|(?P<mark>\.lora|_lora|\.lora_linear_layer)\.(?P<diffusers>down|up)"
    r"|(?<=_lora[12])\.(?P<xlabs>down|up)"
    r")\.weight"
)
_ALPHA = re.compile(r"(?P<stem>.+?)(?P<mark>\.lora|_lora|\.lora_linear_layer)?\.(?:lora_)?alpha")
_SHARED_ALPHA = ("alpha", "lora_alpha", "network_alpha")
_LONGEST_KEY = 1000
_HALVES = {"A": "down", "B": "up", "down": "down", "up": "up"}


@dataclass(frozen=True, eq=False)
class Entry:
    """One adapted layer as a file has it: the layer's weight gets factor * up @ down.

    Attributes:
        key: what the file calls it, the common beginning of its keys.
        component: "unet", "transformer", "text_encoder" and others, or "" where the file does not say.
        path: the module's path without component and wrappers, with dots, or as kohya writes it.
        flat: path is kohya's: an underscore may stand for a dot.
        down: A, shape (r, in), or (r, in, kh, kw) of a convolution.
        up: B, shape (out, r), or (out, r, 1, 1) of a convolution.
        factor: alpha / r; alpha / sqrt(r) for rank-stabilised LoRA; 1 where no alpha is stated.
        origin: what states it.
    """

    key: str
    component: str
    path: str
    flat: bool
    down: Tensor
    up: Tensor
    factor: float
    origin: str = NO_ALPHA


@dataclass(frozen=True)
class Left:
    """What a file holds beside its usable pairs: a key, or the common beginning of several.

    Attributes:
        key: what the file calls it.
        component: as an Entry's.
        reason: why it is no usable pair.
    """

    key: str
    component: str
    reason: str


@dataclass(frozen=True)
class LoraFile:
    """A source, understood.

    Attributes:
        name: what messages call it.
        entries: its pairs, in its own order.
        left: the rest.
    """

    name: str
    entries: list[Entry]
    left: list[Left]


@dataclass
class _Parts:
    """The values of one stem, each with its own key."""

    values: dict[str, tuple[str, Any]] = field(default_factory=dict)
    kohya: bool = False
    mark: str = ""
    twice: str = ""

    def put(self, half: str, key: str, value: object) -> None:
        if half in self.values:
            self.twice = f"{self.values[half][0]} and {key} are the same factor of one module"
        self.values[half] = key, value


def read(source: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module, alpha: float | None = None) -> LoraFile:
    """Reads the LoRA of a file, a folder, a state dict or a live PEFT model; tensors of the latter two are not copied.

    Every generation of keys is known: PEFT's (X.lora_A.weight, with or without an adapter's name), diffusers'
    (X.lora.down.weight, X_lora.down.weight, X.lora_linear_layer.down.weight) and kohya's, which is LCM-LoRA's as well
    (lora_unet_X.lora_down.weight). `Scales` says where alphas are found.

    Args:
        source: a .safetensors file; a .bin, .pt, .pth or .ckpt file that torch.load(weights_only=True) takes; a folder
            with pytorch_lora_weights.safetensors, or adapter_model.safetensors and adapter_config.json, or a sole
            .safetensors file; a state dict; a model with PEFT's adapters.
        alpha: of all layers, whatever the source says.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        TypeError: source is none of these, or a state dict's key or value of another type.
        ValueError: a file that cannot be read, one that is empty or holds several adapters, and a configuration that
            gives A and B another meaning, such as DoRA's.

    Example:
        >>> down, up = torch.ones(2, 3), torch.ones(5, 2)
        >>> state = {"unet.mid.to_out.0.lora_A.weight": down, "unet.mid.to_out.0.lora_B.weight": up}
        >>> [(entry.component, entry.path, entry.factor) for entry in read(state).entries]
        [('unet', 'mid.to_out.0', 1.0)]
        >>> state = {"lora_unet_mid_to_q.lora_down.weight": down, "lora_unet_mid_to_q.lora_up.weight": up}
        >>> state["lora_unet_mid_to_q.alpha"] = torch.tensor(8.0)
        >>> [(entry.path, entry.factor, entry.origin) for entry in read(state).entries]
        [('mid_to_q', 4.0, 'alpha keys beside the factors')]
    """
    try:
        return _read(load(source), alpha)
    except TypeError as error:
        if isinstance(source, str | os.PathLike):  # a file's contents are no argument of the caller's
            raise ValueError(str(error)) from None
        raise


def _read(contents: Contents, alpha: float | None) -> LoraFile:
    name = contents.name
    if not contents.tensors:
        raise ValueError(f"{name} is empty")
    for key in contents.tensors:
        if not isinstance(key, str):
            raise TypeError(f"{name}: keys must be strings, got {short(key)}")
        if len(key) > _LONGEST_KEY:
            raise ValueError(f"{name}: the key {short(key)} has {len(key)} letters, at most {_LONGEST_KEY} are read")
    kinds = {key: kind for key in contents.tensors if (kind := kind_of(key))}
    changed = {kind.stem: kind.what for kind in kinds.values() if kind.changes}
    grouped, unknown, shared = _grouped(contents, kinds)
    left = [Left("its configuration", "", f"{what}, which is not supported") for what in contents.beside]
    left += [Left(key, _component(kind.stem), f"{kind.what}, which is not supported") for key, kind in kinds.items()]
    left += [Left(key, _component(key), "no key of a LoRA's") for key in unknown]
    entries = []
    scales = Scales(contents, alpha, shared)
    for stem, parts in grouped.items():
        try:
            if stem in changed:
                raise UnfitError(f"a part of {changed[stem]}, which is not supported")
            entries.append(_entry(stem, parts, contents.name, scales))
        except UnfitError as error:
            left.append(Left(stem, _component_and_path(stem, parts)[0], str(error)))
    return LoraFile(name, entries, left)


def _grouped(contents: Contents, others: Container[str]) -> tuple[dict[str, _Parts], list[str], tuple[str, Any] | None]:
    """The values by stem, the keys that are none's, and an alpha that names no module."""
    grouped: dict[str, _Parts] = {}
    unknown: list[str] = []
    adapters: dict[str, str] = {}
    shared = None
    for key, value in contents.tensors.items():
        if key in others:
            continue
        if match := _FACTOR.fullmatch(key):
            parts = grouped.setdefault(match["stem"], _Parts())
            if match["adapter"]:
                adapters.setdefault(match["adapter"], key)
            if len(adapters) > 1:
                raise ValueError(f"{contents.name} holds several adapters: {', '.join(adapters.values())}")
            parts.kohya = bool(match["kohya"])
            parts.mark = match["mark"] or ("xlabs" if match["xlabs"] else "")
            half = match["peft"] or match["kohya"] or match["diffusers"] or match["xlabs"]
            parts.put(_HALVES[half], key, value)
        elif match := _ALPHA.fullmatch(key):
            grouped.setdefault(match["stem"], _Parts()).put("alpha", key, value)
        elif key in _SHARED_ALPHA:
            shared = key, value
        else:
            unknown.append(key)
    return grouped, unknown, shared


def _entry(stem: str, parts: _Parts, name: str, scales: Scales) -> Entry:
    if parts.twice:
        raise UnfitError(parts.twice)
    for half, other in (("down", "up"), ("up", "down")):
        if half not in parts.values:
            key = parts.values[other if other in parts.values else "alpha"][0]
            raise UnfitError(f"{key} has no {half} factor beside it")
    down, up = (_checked(*parts.values[half], name) for half in ("down", "up"))
    _check_shapes(parts.values["down"][0], down, parts.values["up"][0], up)
    component, path, flat = _component_and_path(stem, parts)
    scale = scales.of(stem, component, path, len(down), parts.values.get("alpha"))
    return Entry(stem, component, path, flat, down, up, *scale)


def _component(key: str) -> str:
    """The component of a key that is no pair's."""
    flat = split_flat(key, marked=True)
    return (flat or split(key))[0]


def _component_and_path(stem: str, parts: _Parts) -> tuple[str, str, bool]:
    """The component, the module's path, and whether the path is kohya's."""
    if flat := split_flat(stem, marked=not parts.kohya):
        return *flat, True
    component, path = split(stem)
    if parts.kohya and "." not in path:
        return component, path, True
    if parts.mark:
        path = _modern(path, parts.mark)
    return component, path, False


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
        raise UnfitError(f"{key} must hold floating-point numbers, got {value.dtype}")
    if value.is_meta or value.layout != torch.strided:
        raise UnfitError(f"{key} must be a dense tensor with values, got {value.layout} on {value.device}")
    # An axis without a stride repeats one value, and may be longer than memory.
    values = value.detach()[tuple(slice(None if step else 1) for step in value.stride())]
    # The 8-bit formats know no isfinite.
    values = values if value.element_size() > 1 else values.float()
    if not values.isfinite().all():
        raise UnfitError(f"{key} holds NaN or infinity")
    return value


def _check_shapes(down_key: str, down: Tensor, up_key: str, up: Tensor) -> None:
    shapes = f"{down_key} has shape {tuple(down.shape)}, {up_key} {tuple(up.shape)}"
    if not 2 <= down.ndim <= 5 or up.ndim != down.ndim:
        raise UnfitError(f"{shapes}; a linear's have two axes each, a convolution's three to five")
    if down.numel() == 0 or up.numel() == 0:
        raise UnfitError(f"{shapes}; an axis is empty")
    # Which part of the rank a convolution's groups read is for the convolution to say.
    fit = up.shape[1] == down.shape[0] or (down.ndim > 2 and down.shape[0] % up.shape[1] == 0)
    if not fit or any(size != 1 for size in up.shape[2:]):
        raise UnfitError(f"{shapes}; they must be (r, in, ...) and (out, r, ...), the latter without a kernel")
