"""What the header of a safetensors file states of ranks and alphas, in the words of those who write it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from fastsample.lora.files.config import Configs, checked, parse

# A LoraConfig as JSON: diffusers' own key, and those of others.
_OBJECTS = ("lora_adapter_metadata", "lora_config", "adapter_config", "peft_config")
# Single values, which may have a component before them: "transformer.lora_alpha"; by the field that they are.
_FIELDS = {
    **dict.fromkeys(("lora_alpha", "network_alpha", "alpha"), "lora_alpha"),
    **dict.fromkeys(("r", "rank", "lora_rank", "network_dim"), "r"),
    **dict.fromkeys(("use_rslora", "rslora"), "use_rslora"),
    **{name: name for name in ("alpha_pattern", "rank_pattern")},
}
_WORDS = {"true": True, "false": False, "none": None, "null": None, "": None}
# kohya writes "None" where a file has none, and "Dynamic" where each layer states its own.
_KOHYA = "ss_network_alpha"


def objects_of(header: Mapping[str, str], name: str) -> list[Configs]:
    """The LoraConfigs that a header holds whole, each by component, the one to be believed first at the front.

    Raises:
        ValueError: for one that is none.
    """
    found: list[Configs] = []
    for key in _OBJECTS:
        if _is_object(key, header.get(key)):
            parts = _by_component(parse(header[key], f"{name}, {key}"))
            found.append({one: checked(own, name, f"{key} of the header") for one, own in parts.items()})
    return found


def values_of(header: Mapping[str, str], name: str) -> list[Configs]:
    """The single values of a header as configurations, in the order of belief.

    Raises:
        ValueError: for a value of the wrong kind, and for two alphas or ranks of one component that differ.
    """
    fields, keys = _values(header, name)
    origins = {component: keys.get((component, "lora_alpha"), "a key") for component in fields}
    found: list[Configs] = [{one: checked(own, name, f"{origins[one]} of the header") for one, own in fields.items()}]
    alpha = _number(header.get(_KOHYA, ""))
    if alpha is not None:
        found.append({"": checked({"lora_alpha": alpha}, name, f"{_KOHYA} of the header")})
    return found


def _is_object(key: str, text: str | None) -> bool:
    """Whether a text is meant to be read: what others write under the later keys need be no configuration."""
    return text is not None and (key == _OBJECTS[0] or text.lstrip().startswith("{"))


def _by_component(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A configuration by component: a pipeline's saver writes "unet.r", "text_encoder.r", a single model's "r"."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, _, field = key.rpartition(".")
        parts.setdefault(component, {})[field] = value
    return parts


def _values(header: Mapping[str, str], name: str) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], str]]:
    """The single values as fields of configurations by component, and the key of each by component and field."""
    parts: dict[str, dict[str, Any]] = {}
    keys: dict[tuple[str, str], str] = {}
    for key, text in sorted(header.items()):
        component, _, word = key.rpartition(".")
        if word not in _FIELDS:
            continue
        field, value = _FIELDS[word], _value(text, f"{name}: {key} of the header")
        if value is None:
            continue
        if parts.setdefault(component, {}).setdefault(field, value) != value:
            raise ValueError(f"{name}: its header states {keys[component, field]} and {key}, which differ")
        keys.setdefault((component, field), key)
    return parts, keys


def _value(text: str, what: str) -> Any:
    """A number, true, false, or an object of patterns; None where the text says none."""
    plain = text.strip().lower()
    if plain in _WORDS:
        return _WORDS[plain]
    if plain.startswith("{"):
        return parse(text, what)
    number = _number(text)
    if number is None:
        raise ValueError(f"{what} must be a finite number, got {short(text)}")
    return number


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
