"""A model with a LoRA that is to be trained: A and B are its parameters, all else is frozen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsample.checks import integer
from fastsample.lora.attach import attach, state_dict
from fastsample.lora.layers.adapted import Adaptable, why_not
from fastsample.lora.layers.conv import kind_of
from fastsample.lora.layers.frozen import FrozenLayers
from fastsample.lora.layers.slots import Layer, Pair, groups_of, inputs_of
from fastsample.lora.tree import layers_of

_KEPT = ("config", "schedule", "prediction", "variance")  # what samplers and training ask a model for
_ADAPTER = "trained"
_NAMES = ("lora_A", "lora_B")

Factors = tuple[nn.Parameter, nn.Parameter]


class Trainable(nn.Module):
    """A copy of a model whose weights are frozen, with a LoRA whose factors are trained:

        y = x W^T + b + x A^T B^T,  A (rank, in) uniform within 1 / sqrt(in), B (out, rank) 0 in the beginning

    so that it begins as the model. It is called as the model is. The layers are those of `attach`.

    Args:
        model: any torch module; it stays as it is, unless copy is False.
        rank: r, at least 1. A layer of n to m numbers gets (n + m) r trained ones.
        targets: endings of the names of linears and convolutions, such as ("to_q", "to_v"), as PEFT's target_modules.
            None takes all that lie deeper than the model's first and last layers and its embeddings. Where a
            convolution has groups, their number must divide the rank.
        seed: of A.
        lora: A and B of layers X to begin with, X.lora_A.weight and X.lora_B.weight, as `lora` returns them; all the
            others do not count then.
        copy: False trains on the model itself, where memory is short: its weights are frozen, its layers replaced.

    Attributes:
        model: the copy, or the model itself.
        factors: A and B of every layer.

    Raises:
        TypeError: the model is no torch module. ValueError: there is no such layer, or it has adapters already.

    Example:
        >>> net = nn.Sequential(nn.Sequential(nn.Linear(4, 3)))
        >>> adapted = Trainable(net, rank=2)
        >>> sorted((name, *p.shape) for name, p in adapted.named_parameters() if p.requires_grad)
        [('factors.0', 2, 4), ('factors.1', 3, 2)]
        >>> list(adapted.lora())
        ['0.0.lora_A.weight', '0.0.lora_B.weight']
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int = 8,
        *,
        targets: Sequence[str] | None = None,
        seed: int = 0,
        lora: Mapping[str, Tensor] | None = None,
        copy: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch module, got {type(model).__name__}")
        check_bare(model)
        self.rank = integer("rank", rank, 1)
        seed = integer("seed", seed, 0)
        first = _new(model, self.rank, targets, seed) if lora is None else _given(lora)
        self.model = (deepcopy(model) if copy else model).requires_grad_(False)
        for name in _KEPT:
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        attach(self.model, {key: value for path, pair in first.items() for key, value in _named(path, pair)}, _ADAPTER)
        self.factors = nn.ParameterList(factor for pair in first.values() for factor in pair)
        self._take_factors(list(first))
        self.rank = len(self.factors[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        return self.model(*args, **kwargs)

    def lora(self) -> dict[str, Tensor]:
        """The LoRA as `attach` takes it, with alpha = rank and no key for it; see lora.save."""
        return {key: value.clone() for key, value in state_dict(self.model, _ADAPTER).items()}

    def _take_factors(self, paths: Sequence[str]) -> None:
        """Puts the parameters into the layers in the place of the values that they were attached with."""
        layers = layers_of(self.model)
        pairs: dict[FrozenLayers, list[Pair | None]] = {}
        for path, down, up in zip(paths, self.factors[::2], self.factors[1::2], strict=True):
            layer = layers[path]
            of_layer = pairs.setdefault(layer._frozen, [None] * len(layer._frozen.layers))
            of_layer[layer._i] = (down, up)
        for frozen, of_layer in pairs.items():
            frozen.replace(_ADAPTER, of_layer)


def _chosen(model: nn.Module, rank: int, targets: Sequence[str] | None) -> Iterator[tuple[str, Layer]]:
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        parts = path.split(".")
        if targets is None:
            wanted = len(parts) > 1 and not any("embed" in part for part in parts)
        else:
            wanted = any(path == name or path.endswith(f".{name}") for name in targets)
        if not wanted:
            continue
        layer: Any = module
        reason = why_not(layer, kind_of(layer))
        if reason is None and rank % groups_of(layer):
            reason = f"it has {groups_of(layer)} groups, which do not divide the rank {rank}"
        if reason is None:
            yield path, layer
        elif targets is not None:
            raise ValueError(f"targets: {path} cannot have a LoRA: {reason}")


def check_bare(model: nn.Module) -> None:
    """Raises ValueError where a model has adapters, beside which nothing of it is trained."""
    if any(isinstance(module, Adaptable) for module in model.modules()):
        raise ValueError("model has adapters of fastsample.lora already: detach them first")


def check_fit(adapted: Trainable, model: nn.Module) -> None:
    """Raises ValueError where a LoRA of a changed copy of a model does not fit the model itself."""
    for key in adapted.lora():
        path, end, _ = key.partition(".lora_A.weight")
        if not end:
            continue
        own, trained = (whole.get_parameter(f"{path}.weight").shape for whole in (model, adapted.model))
        if own != trained:
            raise ValueError(
                f"targets: {path} cannot have a LoRA, as the model is trained without its variance: its weight is "
                f"{tuple(own)}, the trained one {tuple(trained)}"
            )


def _new(model: nn.Module, rank: int, targets: Sequence[str] | None, seed: int) -> dict[str, Factors]:
    """A and B of every layer that is meant, as they begin."""
    chosen = dict(_chosen(model, rank, targets))
    if not chosen:
        wanted = "it has none" if targets is None else f"none is named {', '.join(map(repr, targets))}"
        raise ValueError(f"targets must name linears or convolutions of the model: {wanted}")
    return {path: _first(layer, rank, seed, place) for place, (path, layer) in enumerate(chosen.items())}


def _given(lora: Mapping[str, Tensor]) -> dict[str, Factors]:
    """A and B by layer."""
    ends = [f".{name}.weight" for name in _NAMES]
    paths = [key.removesuffix(ends[0]) for key in lora if key.endswith(ends[0])]
    if not paths or lora.keys() != {path + end for path in paths for end in ends}:
        raise ValueError("lora must hold X.lora_A.weight and X.lora_B.weight of layers X, and nothing else")
    return {
        path: tuple(nn.Parameter(lora[path + end].detach().float().clone()) for end in ends)  # type: ignore[misc]
        for path in paths
    }


def _first(layer: Layer, rank: int, seed: int, place: int) -> Factors:
    """A and B of a layer as they begin, float32; in a convolution with groups B of each group alone, as PEFT's."""
    weight, into = layer.weight, inputs_of(layer)
    words = np.random.SeedSequence((seed, place)).generate_state(1, np.uint64)
    generator = torch.Generator("cpu").manual_seed(int(words[0]))
    bound = 1 / math.sqrt(math.prod(into))
    down = (2 * torch.rand(rank, *into, generator=generator, dtype=torch.float32, device="cpu") - 1) * bound
    up = torch.zeros(len(weight), rank // groups_of(layer), *(1 for _ in into[1:]), dtype=torch.float32)
    return nn.Parameter(down.to(weight.device)), nn.Parameter(up.to(weight.device))


def _named(path: str, pair: tuple[Tensor, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, factor in zip(_NAMES, pair, strict=True):
        yield f"{path}.{name}.weight", factor.detach()
