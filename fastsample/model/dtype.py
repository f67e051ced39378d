"""The dtype that a model wants its input in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsample.model.hooks import diffusers_hook
from fastsample.model.modules import only_children

COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Whole parts of a module's name: time_embed.0, t_embedder.mlp, timesteps_emb; not text_embedder, runtime or timeless.
_OF_TIME = re.compile(r"(^|[._])((time(step)?s?|temb)(emb[a-z]*|mlp|proj)?|t_emb[a-z]*)\d*([._]|$)", re.IGNORECASE)
# Of torch's layers, its recurrent ones, and those under weight normalisation and other parametrisations; not the scales
# that quantised layers keep beside their weights.
_WEIGHT = re.compile(r"(\w*_)?weight|weight_[ih]h_l\w+|weight_v|original1?")


def dtype_of(module: nn.Module, parts: list[nn.Module], hooked: list[nn.Module]) -> torch.dtype | None:
    """What a module wants, None where it leaves it open; see `placement` for the order of what is asked.

    Args:
        parts: the module and all below it.
        hooked: those of them with a hook.
    """
    for part in hooked:
        cast = diffusers_hook(part, "layerwise_casting")
        if cast is not None and cast.compute_dtype in COMPUTED_IN:
            return cast.compute_dtype
    weights = [(part, weight) for part in parts if part._parameters and (weight := _weight(part)) is not None]
    for part in only_children(module):
        stated = stated_dtype(part)
        if stated is not None and (not _guessed(part) or any(weight.dtype == stated for _, weight in weights)):
            return stated
    if weights:
        return _dtype_of_layers(module, weights)
    for kind in ("_parameters", "_buffers"):
        tensors = [value for part in parts for value in getattr(part, kind).values() if value is not None]
        if (most := _most(value for value in tensors if value.dtype in COMPUTED_IN)) is not None:
            return most
    return None


def stated_dtype(model: Any) -> torch.dtype | None:
    """The `dtype` attribute of a model, where it is one that torch computes in."""
    if not ("dtype" in getattr(model, "__dict__", ()) or hasattr(type(model), "dtype")):
        return None  # asking a module for what it lacks is slow
    try:
        dtype = model.dtype
    except Exception:  # of a property, such as one that looks for a parameter where there is none
        return None
    return dtype if isinstance(dtype, torch.dtype) and dtype in COMPUTED_IN else None


def stated_outside(model: Callable[..., Any]) -> torch.dtype | None:
    """The `dtype` attribute of a callable that is no torch module."""
    return None if isinstance(model, nn.Module) else stated_dtype(model)


def _guessed(module: nn.Module) -> bool:
    """Whether the module's `dtype` is that of its first parameter by a rule of diffusers or transformers."""
    owner = next((kind for kind in type(module).__mro__ if "dtype" in vars(kind)), None)
    return owner is not None and owner.__module__.partition(".")[0] in ("diffusers", "transformers")


def _dtype_of_layers(root: nn.Module, weights: list[tuple[nn.Module, Tensor]]) -> torch.dtype | None:
    first = weights[0][1].dtype
    if all(weight.dtype == first for _, weight in weights):
        return first
    convolution = next((weight.dtype for _, weight in weights if weight.ndim > 2), None)
    if convolution is not None:
        return convolution
    of_time = {id(part) for name, part in root.named_modules() if _OF_TIME.search(name)}
    others = [weight for layer, weight in weights if id(layer) not in of_time]
    return _most(others or (weight for _, weight in weights))


def _most(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The dtype of most of their elements."""
    elements: dict[torch.dtype, int] = {}
    for tensor in tensors:
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    return max(elements, key=elements.__getitem__, default=None)


def _weight(module: nn.Module) -> Tensor | None:
    """The weight of a layer that multiplies its input by one, where torch computes in its dtype."""
    if isinstance(module, _EMBEDDINGS):
        return None
    for name, value in module._parameters.items():
        if value is not None and value.ndim > 1 and value.dtype in COMPUTED_IN and _WEIGHT.fullmatch(name):
            return value
    return None
