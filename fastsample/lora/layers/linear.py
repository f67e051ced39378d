"""Linear layers with low-rank adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastsample.lora.layers.adapters import DETACHED, Adapters, check_names, check_weights
from fastsample.lora.layers.factors import Pair
from fastsample.lora.layers.frozen import FrozenLinears


class Adaptable(nn.Module):
    """What every module with adapters offers."""

    _bank: Adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters, active or not."""
        return tuple(self._bank.parts)

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
        self._bank.add(name, pairs, scale, alpha)

    def swap_adapter(
        self, name: str, pairs: Sequence[Pair | None], scale: float = 1.0, alpha: float | None = None
    ) -> None:
        """Puts other factors in an adapter's place, in the same memory: a compiled layer goes on without compiling.

        Args as add_adapter's. Ranks may be lower than the capacity; a linear whose pair is None gets nothing.

        Raises:
            ValueError, TypeError, RuntimeError: as add_adapter, for an unknown name, and for factors for a linear for
                which the adapter had none.
        """
        self._bank.check_attached()
        check_names([name], self._bank.parts)
        self._bank.replace(name, pairs, scale, alpha)

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Makes these adapters the active ones, each times its weight. Without an adapter_index they are summed.

        Like every change to adapters it must not run beside a call, which might see half of it.

        Raises:
            ValueError, TypeError: for an unknown name, a weight that is not finite, and another order while a
                set_adapter_index counts the present one. RuntimeError: while merged.
        """
        self._bank.check_attached()
        check_weights(weights, self._bank.parts)
        self._bank.check_order(weights)
        self._bank.activate(weights)

    def remove_adapter(self, name: str) -> None:
        """Forgets an adapter.

        Raises:
            ValueError: for an unknown name, and one that a set_adapter_index counts. RuntimeError: while merged.
        """
        self._bank.check_attached()
        self._bank.remove(name)

    def merge(self) -> None:
        """Adds the active adapters to the weights; the weights as they were are kept for unmerge().

        state_dict() then gives the sums, to be saved as weights of their own.

        Raises:
            RuntimeError: where they are merged already.
        """
        self._bank.merge()

    def unmerge(self) -> None:
        """Gives the weights back their bits from before merge().

        Raises:
            RuntimeError: where adapters are not merged.
        """
        self._bank.unmerge()


class AdaptedLayer(Adaptable):
    """Stands in the place of a module, with its parameters, attributes and hooks."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _replaced: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # The dicts of parameters and hooks are the module's own: what is set or registered here stays after detach.
        self.__dict__.update(module.__dict__)
        # Not a submodule.
        self.__dict__["_replaced"] = module
        self._i = 0

    def give_back(self) -> nn.Module:
        """The replaced module, as it was but for what has been done to it here, such as .to() and .eval()."""
        module = self._replaced
        module.training, module._is_full_backward_hook = self.training, self._is_full_backward_hook
        return module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        bank = self._bank
        bank.check_attached()
        bank.restore()
        super()._apply(fn, recurse)
        if bank.unmerged is not None:
            bank.unmerged[self._i] = fn(bank.unmerged[self._i])
        if bank.index is not None:
            bank.index = fn(bank.index)
        bank.changed(self._i)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._bank.check_attached()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        if self._bank.detached:
            errors.append(f"{prefix[:-1] or 'the module'}: {DETACHED}")
            return
        if self._bank.unmerged is not None:
            errors.append(f"the adapters of {prefix[:-1]} are merged into its weight: call unmerge() before loading.")
            return
        self._bank.restore()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._bank.changed(self._i)

    def __getstate__(self) -> dict[str, Any]:
        # A copy holds the weights whole and packs them itself; this layer, which may be in use, stays as it is.
        parameters = self._bank.parameters(self._i)
        replaced = object.__new__(type(self._replaced))
        replaced.__dict__.update(self._replaced.__dict__, _parameters=parameters)
        return {**self.__dict__, "_parameters": parameters, "_replaced": replaced}

    def extra_repr(self) -> str:
        return f"{self._replaced.extra_repr()}, adapters={', '.join(self.adapters) or 'none'}"


class LoRALinear(AdaptedLayer):
    """An nn.Linear with adapters, one pass for both.

        y = x W^T + b + sum_a weight_a * factor_a * (x A_a^T) B_a^T

    weight and bias are the original's Parameters under the original's names. They are frozen: they get no gradients,
    and where one has been changed after packing, forward raises RuntimeError. It cannot see a write through
    `weight.data`, nor any change under torch.compile: call repack() after it.

    Calls may run in several threads; what changes the layer may not run beside one. Under autocast the product is
    still computed in the weights' dtype, and its result has autocast's.

    Example:
        >>> layer = LoRALinear.from_linear(nn.Linear(2, 3, bias=False))
        >>> layer.add_adapter("style", [(torch.ones(1, 2), torch.zeros(3, 1))], scale=0.5, alpha=8)
        >>> layer(torch.ones(4, 2)).shape, layer.adapters, list(layer.state_dict())
        (torch.Size([4, 3]), ('style',), ['weight'])
    """

    _bank: FrozenLinears

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, keep_weight: bool = True, capacity: int | None = None) -> LoRALinear:
        """Takes a linear's place.

        Args:
            linear: stays valid, and shares its parameters with the layer.
            keep_weight: whether the original weight stays beside the packed one. Otherwise its storage is released, the
                linear gives NaN, and state_dict() unpacks.
            capacity: the rank that each adapter has room for, so that others can be swapped in; None: its own rank.

        Raises:
            TypeError: for anything but a plain nn.Linear with its weight. ValueError: for a capacity below 1.
        """
        return linear_layers([linear], keep_weight, capacity)[0]

    def forward(self, x: Tensor, adapter_index: Tensor | None = None) -> Tensor:
        """The linear of x.

        Args:
            x: (..., in) in the weight's dtype; under autocast any, and the result has the autocast dtype.
            adapter_index: int64 (B,), B = x.shape[0]: which of the active adapters, in the order of set_adapters, each
                sample gets; -1 none. Without it every sample gets the sum of all.

        Raises:
            ValueError, TypeError, IndexError: as fastsample.ops.lora_linear. RuntimeError: for a weight changed after
                packing, and an adapter_index while merged.
        """
        return self._bank(x, adapter_index, self._i)[0]

    def repack(self) -> None:
        """Takes weight and bias as they are now."""
        self._bank.pack()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Before the parameters are read: a detach in another thread gives them their weights back.
        released, weight = self._bank.released, self._bank.weight(self._i)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if released:
            destination[prefix + "weight"] = weight


class QKVProjection(Adaptable):
    """Several LoRALinears of one input, such as attention's q, k and v: x is read once, the adapters shrink it once.

    Its state dict is that of an nn.ModuleList of the linears.

    Example:
        >>> q, k, v = (nn.Linear(8, 8) for _ in range(3))
        >>> qkv = QKVProjection.from_linears([q, k, v])
        >>> qkv.add_adapter("style", [(torch.ones(2, 8), torch.ones(8, 2)), None, None])
        >>> [y.shape for y in qkv(torch.ones(1, 5, 8))], torch.equal(qkv.linear(1).weight, k.weight)
        ([torch.Size([1, 5, 8]), torch.Size([1, 5, 8]), torch.Size([1, 5, 8])], True)
    """

    _bank: FrozenLinears

    @classmethod
    def from_linears(
        cls, linears: Sequence[nn.Linear], *, keep_weight: bool = True, capacity: int | None = None
    ) -> QKVProjection:
        """Args as LoRALinear.from_linear's, and its errors.

        Raises:
            ValueError: for linears that do not share in_features, dtype and device.
        """
        layers = linear_layers(linears, keep_weight, capacity)
        projection = cls()
        projection._bank = layers[0]._bank
        for i, layer in enumerate(layers):
            projection.add_module(str(i), layer)
        return projection

    def linear(self, i: int) -> LoRALinear:
        """The i-th linear by itself, on the same packed memory and with the same adapters."""
        layer = self._bank.layers[i]
        assert isinstance(layer, LoRALinear)
        return layer

    def forward(self, x: Tensor, adapter_index: Tensor | None = None) -> tuple[Tensor, ...]:
        """One output per linear; see LoRALinear.forward. The hooks of the single linears do not run."""
        return self._bank(x, adapter_index)

    def repack(self) -> None:
        """Takes weights and biases as they are now."""
        self._bank.pack()


def linear_layers(linears: Sequence[nn.Module], keep_weight: bool, capacity: int | None) -> list[LoRALinear]:
    """LoRALinears with packed memory and adapters in common."""
    for linear in linears:
        check_replaceable(linear, nn.Linear)
    check_capacity(capacity)
    layers = [LoRALinear(linear) for linear in linears]
    bank = FrozenLinears(layers, keep_weight, capacity)
    for i, layer in enumerate(layers):
        layer._bank, layer._i = bank, i
    return layers


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


def check_capacity(capacity: int | None) -> None:
    if capacity is not None and (not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1):
        raise ValueError(f"capacity must be a rank of at least 1 or None, got {capacity!r}")
