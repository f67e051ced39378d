"""How strong a file's low-rank pair is: where its alpha is stated, and the factor that follows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsample.lora.files.config import Configs, PeftConfig
from fastsample.lora.files.reading import Contents
from fastsample.lora.files.refused import UnfitError

NO_ALPHA = "no alpha stated"
_DENOISERS = ("", "unet", "transformer")


class Scale(NamedTuple):
    """What multiplies B A of one layer, and which statement says so."""

    factor: float
    origin: str


class Scales:
    """The scales of a source's layers. The first of these that says something of a layer counts:

        the argument alpha                                         alpha / r
        a factor that a live layer holds                           as it is
        the layer's own key X.alpha, 0 counting as absent          alpha / r
        a key alpha, lora_alpha or network_alpha of no layer       alpha / r
        lora_adapter_metadata of the header, or another LoraConfig alpha / r
        lora_alpha, network_alpha or alpha of the header           alpha / r
        ss_network_alpha of the header                             alpha / r
        adapter_config.json beside the file, before the header's for PEFT's adapter_model
        nothing                                                    1

    with sqrt(r) for r where a configuration says use_rslora.
    """

    def __init__(self, contents: Contents, alpha: float | None, shared: tuple[str, Any] | None = None) -> None:
        self._contents, self._alpha, self._shared = contents, alpha, shared

    def of(self, stem: str, component: str, path: str, rank: int, own: tuple[str, Any] | None) -> Scale:
        """The scale of a layer.

        Args:
            stem: what the file calls it.
            component, path: what that means.
            rank: r of its factors.
            own: its own key of an alpha, and the value.

        Raises:
            ValueError, TypeError: for an alpha that is no finite number, and a configuration that states another rank.
        """
        if self._alpha is not None:
            stabilised = any(config.stabilised for config, _ in self._stating(component, path))
            return Scale(self._alpha / _divisor(rank, stabilised), "the argument alpha")
        if stem in self._contents.factors:
            return Scale(self._contents.factors[stem], f"the layers of {self._contents.name}")
        if own is not None and (alpha := number(*own, self._contents.name)):
            return Scale(alpha / rank, "alpha keys beside the factors")
        if self._shared is not None and (alpha := number(*self._shared, self._contents.name)):
            return Scale(alpha / rank, f"the key {self._shared[0]}")
        for config, whole in self._stating(component, path):
            said, stated = config.alpha_of(whole), config.rank_of(whole)
            if stated not in (None, rank):
                raise UnfitError(
                    f"{whole} has rank {rank}, its configuration says {stated} ({config.origin}); the "
                    "argument alpha states the scale where that is another adapter's"
                )
            if said is not None:
                return Scale(said / _divisor(rank, config.stabilised), config.origin)
        return Scale(1.0, NO_ALPHA)

    def _stating(self, component: str, path: str) -> Iterator[tuple[PeftConfig, str]]:
        """The configurations that may speak of a layer, each with the layer's path as its patterns have it."""
        for configs in self._contents.configs:
            yield from _speaking(configs, component, path)
        for configs in self._later:
            yield from _speaking(configs, component, path)

    @cached_property
    def _later(self) -> list[Configs]:
        return self._contents.later()


def number(key: str, value: object, name: str) -> float:
    """The one number that a key holds.

    Raises:
        TypeError, ValueError: it holds something else, or no finite one.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.is_meta or value.layout != torch.strided:
            raise UnfitError(f"{key} must be one number, got {value.dtype} of shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: {key} must be a number, got {type(value).__name__}")
    try:
        as_float = float(value)
    except OverflowError:
        as_float = math.inf
    if not math.isfinite(as_float):
        raise UnfitError(f"{key} is {as_float}, no finite number")
    return as_float


def _speaking(configs: Configs, component: str, path: str) -> Iterator[tuple[PeftConfig, str]]:
    if component in configs:
        yield configs[component], path
    elif "" in configs:
        # The patterns of a configuration without component match the whole path.
        yield configs[""], f"{component}.{path}" if component else path
    elif component in _DENOISERS and len(denoisers := [name for name in configs if name in _DENOISERS]) == 1:
        # What one tool calls unet or nothing is the transformer of another.
        yield configs[denoisers[0]], path


def _divisor(rank: int, stabilised: bool) -> float:
    return math.sqrt(rank) if stabilised else rank
