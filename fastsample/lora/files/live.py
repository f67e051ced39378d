"""The adapter of a model that has PEFT's layers in it: its factors, its configuration and each layer's scale."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn


class Adapter(NamedTuple):
    """What a live model holds of one adapter.

    Attributes:
        tensors: as PEFT saves them.
        config: PEFT's configuration.
        factors: what each layer multiplies its product by, under the name that its tensors have.
    """

    tensors: Mapping[str, Tensor]
    config: dict[str, Any]
    factors: dict[str, float]


def adapter_of(model: nn.Module) -> Adapter:
    """The active adapter of a PeftModel, or of a model of diffusers or transformers that PEFT's layers were put into.

    Raises:
        TypeError: the model has no adapters of PEFT.
        ValueError: it has several, of which none or more than one is active.
    """
    # A model can only hold PEFT's layers where PEFT is imported.
    peft: Any = sys.modules.get("peft")
    configs = getattr(model, "peft_config", None)
    if peft is None or not isinstance(configs, Mapping) or not configs:
        raise TypeError(
            f"source must be a path, a state dict or a PEFT model, got a {type(model).__name__} without PEFT's adapters"
        )
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
    }
    name = _chosen(list(configs), layers, model)
    tensors = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    factors = {
        path: float(layer.scaling[name]) for path, layer in layers.items() if name in getattr(layer, "scaling", {})
    }
    return Adapter(tensors, configs[name].to_dict(), factors)


def _chosen(names: list[str], layers: Mapping[str, Any], model: nn.Module) -> str:
    if len(names) == 1:
        return names[0]
    active = list(dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters))
    if len(active) != 1:
        raise ValueError(
            f"source must have one active adapter: of {', '.join(map(repr, names))} the {type(model).__name__} has "
            f"{', '.join(map(repr, active)) or 'none'} active"
        )
    return active[0]
