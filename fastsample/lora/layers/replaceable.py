"""Which modules adapted layers can take the place of."""

from __future__ import annotations

from torch import nn


def check_replaceable(module: object, kind: type[nn.Module]) -> None:
    """Raises unless forward is `kind`'s own, on a plain Parameter: quantised and wrapped modules compute more."""
    if (reason := _odd(module, kind)) is not None:
        what = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(f"adapters need a plain {kind.__name__} with its weights loaded, got {what}: {reason}")


def _odd(module: object, kind: type[nn.Module]) -> str | None:
    """Why an adapted layer cannot take the module's place."""
    if not isinstance(module, kind):
        return f"it is no {kind.__name__}"
    if type(module).forward is not kind.forward or "forward" in vars(module):
        return f"its forward is not {kind.__name__}'s own"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention does not call it"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"its weight is no nn.Parameter but a {type(module.weight).__name__}"
    if weight.is_meta:
        return "its weight is on the meta device"
    if not any(weight.stride()) and weight.isnan().any():
        return "its weight was released by keep_weight=False; load it again"
    return None
