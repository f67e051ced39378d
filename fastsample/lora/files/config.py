"""PEFT's configuration of an adapter, checked before anything is done with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from fastsample.lora.files.patterns import Patterns
from fastsample.lora.files.refused import BESIDE, refuse_config

# A pattern for every module of a large model takes some hundred KB.
LARGEST = 4 << 20
_DEEPEST = 32


@dataclass(frozen=True)
class PeftConfig:
    """What PEFT's configuration says of ranks and alphas; as PEFT does it, the first pattern to match a path counts.

    Attributes:
        name: what messages call the file.
        origin: where in the file or beside it the configuration stands.
        rank, alpha: those of modules that no pattern names; None where the configuration states none.
        ranks, alphas: by pattern.
        stabilised: whether the factor is alpha / sqrt(r) instead of alpha / r.
        beside: what it asks for beside the low-rank pairs, which stay what they are without it.
    """

    name: str
    origin: str
    rank: int | None
    alpha: float | None
    ranks: Patterns
    alphas: Patterns
    stabilised: bool
    beside: tuple[str, ...]

    def rank_of(self, path: str) -> int | None:
        """The rank stated for the module at this path."""
        rank = _named(f"{self.name}: rank_pattern", self.ranks, path)
        return self.rank if rank is None else int(rank)

    def alpha_of(self, path: str) -> float | None:
        """The alpha stated for the module at this path."""
        alpha = _named(f"{self.name}: alpha_pattern", self.alphas, path)
        return self.alpha if alpha is None else float(alpha)


# Configurations by component; the one at "" serves every component that has none itself.
Configs = Mapping[str, PeftConfig]


def parse(text: str | bytes, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: for anything else, and for an object that is larger or deeper than PEFT's are.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{name} has {len(text)} bytes, at most {LARGEST} are read")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{name} must hold an object, got {type(config).__name__}")
    level: list[Any] = [config]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"{name} is nested more than {_DEEPEST} levels deep")
    return config


def checked(config: Mapping[str, Any], name: str, origin: str = "the configuration") -> PeftConfig:
    """A configuration's parts.

    Raises:
        ValueError: where it asks for more than alpha / r * B A, or a value is of the wrong kind.
    """
    refuse_config(config, name)
    stabilised = config.get("use_rslora")
    if stabilised is not None and not isinstance(stabilised, bool):
        raise ValueError(f"{name}: use_rslora must be true or false, got {short(stabilised)}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    ranks, alphas = (_mapping(config, key, name) for key in ("rank_pattern", "alpha_pattern"))
    return PeftConfig(
        name,
        origin,
        None if rank is None else _rank(rank, f"{name}: r of its configuration"),
        None if alpha is None else _alpha(alpha, f"{name}: lora_alpha of its configuration"),
        _patterns({key: _rank(rank, f"{name}: rank_pattern of {short(key)}") for key, rank in ranks.items()},
                  f"{name}: rank_pattern"),
        _patterns({key: _alpha(alpha, f"{name}: alpha_pattern of {short(key)}") for key, alpha in alphas.items()},
                  f"{name}: alpha_pattern"),
        bool(stabilised),
        tuple(what for field, what in BESIDE.items() if config.get(field)),
    )  # fmt: skip


def _mapping(config: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    values = config.get(key)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{name}: {key} must map patterns to numbers, got {short(values)}")
    return values


def _patterns(values: Mapping[str, Any], name: str) -> Patterns:
    try:
        return Patterns(values)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _named(name: str, patterns: Patterns, path: str) -> Any:
    try:
        return patterns.value(path)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _alpha(value: object, what: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise ValueError(f"{what} must be a finite number, got {short(value)}")


def _rank(value: object, what: str) -> int:
    number = _alpha(value, what)
    if number < 1 or number >= 1 << 31 or number != int(number):
        raise ValueError(f"{what} must be a whole number from 1 on, got {short(value)}")
    return int(number)
