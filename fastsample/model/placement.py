"""The dtype and device that torch modules want their input in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsample.model.called_modules import only_children

COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_OF_TIME = re.compile(r"time|temb|t_emb", re.IGNORECASE)
# Of torch's layers, its recurrent ones, and those under weight normalisation and other parametrisations; not the scales
# that quantised layers keep beside their weights.
_WEIGHT = re.compile(r"(\w*_)?weight|weight_[ih]h_l\w+|weight_v|original1?")


def placement(modules: Iterable[nn.Module]) -> tuple[torch.dtype | None, torch.device | None]:
    """The dtype that all these modules want, and where the first of them that lies anywhere computes.

    What a module wants, in this order: the compute dtype of diffusers' layerwise casting; its `dtype` attribute; what
    its layers that multiply by weights hold (the first convolution; else most of the weights of linears, those of the
    time's embedding aside where dtypes differ); what most of its other parameters hold, or of its buffers. Dtypes of
    storage alone (float8, integers of quantised weights) are passed over.

    A module computes where an offloading hook of accelerate or diffusers brings it, else where its first parameter
    lies, or buffer: never on "meta".

    Returns:
        A dtype that torch computes in, None where they differ or leave it open; a device, None where they leave it
        open.
    """
    dtypes, devices = set(), []
    for module in modules:
        parts = parts_of(module)
        hooked = [one for one in parts if "_hf_hook" in one.__dict__ or "_diffusers_hook" in one.__dict__]
        dtypes.add(_dtype_of(module, parts, hooked))
        devices.append(_device_of(parts, hooked))
    dtypes.discard(None)
    return dtypes.pop() if len(dtypes) == 1 else None, next((one for one in devices if one is not None), None)


def stated_dtype(model: Any) -> torch.dtype | None:
    """The `dtype` attribute of a model, where it is one that torch computes in."""
    if not ("dtype" in getattr(model, "__dict__", ()) or hasattr(type(model), "dtype")):
        return None  # asking a module for what it lacks is slow
    try:
        dtype = model.dtype
    except (StopIteration, AttributeError, RuntimeError):  # of a property that looks for a parameter
        return None
    return dtype if isinstance(dtype, torch.dtype) and dtype in COMPUTED_IN else None


def parts_of(root: nn.Module) -> list[nn.Module]:
    """The root and every module below it, once, in the order of registration."""
    waiting, seen, parts = [root], set(), []
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        parts.append(module)
        if children := module._modules:
            waiting += [child for child in reversed(children.values()) if child is not None]
    return parts


def _dtype_of(module: nn.Module, parts: list[nn.Module], hooked: list[nn.Module]) -> torch.dtype | None:
    for one in hooked:
        cast = _diffusers_hook(one, "layerwise_casting")
        if cast is not None and cast.compute_dtype in COMPUTED_IN:
            return cast.compute_dtype
    weights = [(one, weight) for one in parts if one._parameters and (weight := _weight(one)) is not None]
    for one in only_children(module):
        stated = stated_dtype(one)
        if stated is not None and (not _guessed(one) or any(weight.dtype == stated for _, weight in weights)):
            return stated
    if weights:
        return _dtype_of_layers(module, weights)
    for kind in ("_parameters", "_buffers"):
        tensors = [value for one in parts for value in getattr(one, kind).values() if value is not None]
        if (most := _most(value for value in tensors if value.dtype in COMPUTED_IN)) is not None:
            return most
    return None


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
    of_time = {id(one) for name, one in root.named_modules() if _OF_TIME.search(name)}
    others = [weight for one, weight in weights if id(one) not in of_time]
    return _most(others or (weight for _, weight in weights))


def _most(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The dtype of most of their elements."""
    elements: dict[torch.dtype, int] = {}
    for one in tensors:
        elements[one.dtype] = elements.get(one.dtype, 0) + one.numel()
    return max(elements, key=elements.__getitem__, default=None)


def _weight(module: nn.Module) -> Tensor | None:
    """The weight of a layer that multiplies its input by one, where torch computes in its dtype."""
    if isinstance(module, _EMBEDDINGS):
        return None
    for name, value in module._parameters.items():
        if value is not None and value.ndim > 1 and value.dtype in COMPUTED_IN and _WEIGHT.fullmatch(name):
            return value
    return None


def _device_of(parts: list[nn.Module], hooked: list[nn.Module]) -> torch.device | None:
    for one in hooked:
        if (brought := _offloaded_to(one)) is not None:
            return brought
    for kind in ("_parameters", "_buffers"):
        for one in parts:
            for value in getattr(one, kind).values():
                if value is not None and value.device.type != "meta":
                    return value.device
    return None


def _offloaded_to(module: nn.Module) -> torch.device | None:
    """Where a hook takes the module's weights, or its input, before it computes."""
    if (hook := module.__dict__.get("_hf_hook")) is not None:
        for one in (hook, *getattr(hook, "hooks", ())):
            device = getattr(one, "execution_device", None)
            if device is not None and torch.device(device).type != "meta":
                return torch.device(device)
    grouped = _diffusers_hook(module, "group_offloading")
    return None if grouped is None else getattr(getattr(grouped, "config", None), "onload_device", None)


def _diffusers_hook(module: nn.Module, name: str) -> Any:
    registry = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.get_hook(name)
