"""Modules with adapters: their methods, how a layer takes another module's place, and which modules it can replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from fastsample.lora.checks import check_names, check_weights
from fastsample.lora.layers.frozen import DETACHED, FrozenLayers
from fastsample.lora.layers.hooks import HOOK_NAMES, is_hooked
from fastsample.lora.layers.slots import Pair

_Adapted = TypeVar("_Adapted", bound="AdaptedLayer")
# What _class_of has made: one class for all layers of a kind.
_classes: dict[tuple[type, type], type[Any]] = {}


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
    """Stands in the place of a module and is what that is: an instance of its class, with all its attributes.

    Layer and module have one dict of attributes. What is set or registered on either is seen on both, and stays after
    detach.
    """

    # Beside the dict of attributes, which is the module's.
    __slots__ = ("_frozen", "_i", "_replaced")

    # An nn.Parameter, of the bias perhaps None; the replaced class says so too, in other words.
    weight: Any
    bias: Any
    _i: int
    _replaced: nn.Module
    # Of a class that `_class_of` made: the adapted class and the replaced one.
    _made_of: ClassVar[tuple[type[AdaptedLayer], type[nn.Module]] | None] = None

    def __init__(self, module: nn.Module) -> None:
        self._share(module)
        self._i = 0

    @classmethod
    def _in_place_of(cls: type[_Adapted], module: nn.Module) -> _Adapted:
        """A layer of the module's class too; it still needs its `_frozen`.

        Raises:
            TypeError: for a module of whose class none can be derived.
        """
        layer: _Adapted = _class_of(cls, type(module))(module)
        return layer

    def give_back(self) -> nn.Module:
        """The replaced module as it was, but for changes made to this layer meanwhile, such as .to() and .eval()."""
        return self._replaced

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("weight", "bias"):
            if name in HOOK_NAMES:
                self._frozen.expect_moves()
            super().__setattr__(name, value)
            return
        self._frozen.check_attached()
        self._frozen.check_not_merged()
        self._check_parameter(name, value)
        self._frozen.restore()
        super().__setattr__(name, value)
        self._frozen.changed(self._i)

    def _check_parameter(self, name: str, value: Any) -> None:
        weight = self.weight
        shape = weight.shape if name == "weight" else weight.shape[:1]
        if isinstance(value, Tensor) and value.shape != shape:
            raise ValueError(f"{name} must keep its shape {tuple(shape)} beside adapters, got {tuple(value.shape)}")
        if value is None and name == "weight":
            raise ValueError("weight must be a Parameter beside adapters, got None")

    def _share(self, module: nn.Module) -> None:
        # Past nn.Module's own __setattr__, which would make the replaced module a submodule.
        object.__setattr__(self, "__dict__", module.__dict__)
        object.__setattr__(self, "_replaced", module)

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
        state = {"_frozen": self._frozen, "_i": self._i, "_replaced": self._replaced}
        return state if parameters is self._parameters else {**state, "_parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        frozen = state.pop("_bank", None)  # the name that earlier pickles have
        self._share(state.pop("_replaced"))
        self._frozen, self._i = state.pop("_frozen", frozen), state.pop("_i")
        # Of earlier pickles the layer's attributes, which were its own then.
        nn.Module.__setstate__(self, state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle finds no made class by its name.
        return (
            super().__reduce_ex__(protocol) if self._made_of is None else (_blank, self._made_of, self.__getstate__())
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedLayer:
        # Before that of a replaced class, which would copy the layer without its adapters.
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__setstate__(deepcopy(self.__getstate__(), memo))
        return twin

    def extra_repr(self) -> str:
        return f"{self._replaced.extra_repr()}, adapters={', '.join(self.adapters) or 'none'}"


def _class_of(adapted: type[AdaptedLayer], replaced: type[nn.Module]) -> type[Any]:
    """The adapted class, or a class that is also the replaced one, where that is a user's."""
    if issubclass(adapted, replaced):
        return adapted
    if (adapted, replaced) in _classes:
        return _classes[adapted, replaced]
    attributes = {"__module__": adapted.__module__, "__doc__": adapted.__doc__, "_made_of": (adapted, replaced)}
    try:
        made = type(f"LoRA{replaced.__name__}", (adapted, replaced), attributes)
    except TypeError as error:
        what = f"{replaced.__module__}.{replaced.__qualname__}"
        raise TypeError(f"adapters need a class that others can be derived from, {what} is none: {error}") from error
    return _classes.setdefault((adapted, replaced), made)


def _blank(adapted: type[AdaptedLayer], replaced: type[nn.Module]) -> AdaptedLayer:
    """What pickle fills."""
    layer: AdaptedLayer = object.__new__(_class_of(adapted, replaced))
    return layer


def check_replaceable(module: object, kind: type[nn.Module], hooked: bool = False) -> None:
    """Raises unless the module's forward is `kind`'s, on a plain Parameter: quantised and wrapped ones compute more.

    With `hooked`, hooks of accelerate and diffusers around that forward are allowed, and weights that they offload.
    """
    if (reason := why_not(module, kind, hooked)) is not None:
        what = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(f"adapters need a plain {kind.__name__} with its weights loaded, got {what}: {reason}")


def why_not(module: object, kind: type[nn.Module], hooked: bool = False) -> str | None:
    """Why an adapted layer cannot take the module's place."""
    if not isinstance(module, kind):
        return f"it is no {kind.__name__}"
    if isinstance(module, AdaptedLayer):
        return "it has adapters already"
    hooked = hooked and is_hooked(module, kind)
    if type(module).forward is not kind.forward or ("forward" in vars(module) and not hooked):
        return f"its forward is not {kind.__name__}'s own"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "its compile() was called: call it after attach"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention does not call it"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"its weight is no nn.Parameter but a {type(module.weight).__name__}"
    if weight.is_meta:
        return None if hooked else "its weight is on the meta device"
    if not any(weight.stride()) and weight.isnan().any():
        return "its weight was released by keep_weight=False; load it again"
    return None
