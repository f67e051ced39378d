"""Modules with adapters: their methods, how a layer takes another module's place, and which modules it can replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastsample.lora.checks import check_names, check_weights
from fastsample.lora.layers.frozen import DETACHED, FrozenLayers
from fastsample.lora.layers.slots import Pair


class Adaptable(nn.Module):
    """The methods of every module with adapters."""

    _frozen: FrozenLayers

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters, active or not."""
        return tuple(self._frozen.adapters.slots)

    def add_adapter(
        self, name: str, pairs: Sequence[Pair | None], scale: float = 1.0, alpha: float | None = None
    ) -> None:
        """Adds scale * (alpha / r, or 1 where alpha is None) * x A^T B^T to each linear's output, at once.

        Args:
            name: new among the adapters.
            pairs: (A, B) or None for each linear; A (r, in), B (out, r), of a convolution (r, in, kh, kw) and
                (out, r, 1, 1). They are kept, not copied: gradients reach them where they require grad.
            scale: multiplies the output.
            alpha: see above.

        Raises:
            ValueError, TypeError: for a name that is taken, factors that do not fit, a rank above the capacity, numbers
                that are not finite. RuntimeError: while merged. Nothing has changed then.
        """
        self._frozen.add(name, pairs, scale, alpha)

    def swap_adapter(
        self, name: str, pairs: Sequence[Pair | None], scale: float = 1.0, alpha: float | None = None
    ) -> None:
        """Puts other factors in an adapter's place, in the same memory: a compiled layer goes on without compiling.

        Args as add_adapter's. Ranks may be lower than the capacity; a linear whose pair is None gets nothing.

        Raises:
            ValueError, TypeError, RuntimeError: as add_adapter, for an unknown name, and for factors for a linear for
                which the adapter had none.
        """
        self._frozen.check_attached()
        check_names([name], self._frozen.adapters.slots)
        self._frozen.replace(name, pairs, scale, alpha)

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Makes exactly the named adapters active, each times its weight. Without an adapter_index they are summed.

        Like every change to adapters it must not run beside a call, which might see half of the change.

        Raises:
            ValueError, TypeError: for an unknown name, a weight that is not finite, and another order while a
                set_adapter_index counts the present one. RuntimeError: while merged.
        """
        self._frozen.check_attached()
        check_weights(weights, self._frozen.adapters.slots)
        self._frozen.check_order(weights)
        self._frozen.activate(weights)

    def remove_adapter(self, name: str) -> None:
        """Forgets an adapter.

        Raises:
            ValueError: for an unknown name, and one that a set_adapter_index counts. RuntimeError: while merged.
        """
        self._frozen.check_attached()
        self._frozen.remove(name)

    def merge(self) -> None:
        """Adds the active adapters to the weights; the weights as they were are kept for unmerge().

        state_dict() then gives the sums, to be saved as weights of their own.

        Raises:
            RuntimeError: where they are merged already.
        """
        self._frozen.merge()

    def unmerge(self) -> None:
        """Gives the weights back their bits from before merge().

        Raises:
            RuntimeError: where adapters are not merged.
        """
        self._frozen.unmerge()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_bank" in state:  # the name that earlier pickles have
            state["_frozen"] = state.pop("_bank")
        super().__setstate__(state)


class AdaptedLayer(Adaptable):
    """Stands in the place of a module, with its parameters, attributes and hooks."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _replaced: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # The dicts of parameters and hooks are the module's own: what is set or registered here stays after detach.
        self.__dict__.update(module.__dict__)
        # Set in __dict__, since the replaced module must not become a submodule.
        self.__dict__["_replaced"] = module
        self._i = 0

    def give_back(self) -> nn.Module:
        """The replaced module as it was, but for changes made to this layer meanwhile, such as .to() and .eval()."""
        module = self._replaced
        module.training, module._is_full_backward_hook = self.training, self._is_full_backward_hook
        return module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        frozen = self._frozen
        frozen.check_attached()
        frozen.restore()
        super()._apply(fn, recurse)
        if frozen.unmerged is not None:
            frozen.unmerged[self._i] = fn(frozen.unmerged[self._i])
        if frozen.index is not None:
            frozen.index = fn(frozen.index)
        frozen.changed(self._i)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._frozen.check_attached()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        if self._frozen.detached:
            errors.append(f"{prefix[:-1] or 'the module'}: {DETACHED}")
            return
        if self._frozen.unmerged is not None:
            errors.append(f"the adapters of {prefix[:-1]} are merged into its weight: call unmerge() before loading.")
            return
        self._frozen.restore()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._frozen.changed(self._i)

    def __getstate__(self) -> dict[str, Any]:
        # A copy holds the weights whole and packs them itself; this layer, which may be in use, stays as it is.
        parameters = self._frozen.parameters(self._i)
        replaced = object.__new__(type(self._replaced))
        replaced.__dict__.update(self._replaced.__dict__, _parameters=parameters)
        return {**self.__dict__, "_parameters": parameters, "_replaced": replaced}

    def extra_repr(self) -> str:
        return f"{self._replaced.extra_repr()}, adapters={', '.join(self.adapters) or 'none'}"


def check_replaceable(module: object, kind: type[nn.Module]) -> None:
    """Raises unless the module's forward is `kind`'s, on a plain Parameter: quantised and wrapped ones compute more."""
    if (reason := why_not(module, kind)) is not None:
        what = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(f"adapters need a plain {kind.__name__} with its weights loaded, got {what}: {reason}")


def why_not(module: object, kind: type[nn.Module]) -> str | None:
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
