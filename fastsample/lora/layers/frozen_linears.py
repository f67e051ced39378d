"""Linears that read one input, packed once, and their adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastsample.lora.layers.frozen import LOCK, FrozenLayers, mark
from fastsample.lora.layers.hooks import moves
from fastsample.lora.layers.slots import Layer
from fastsample.ops.lora import lora_linear
from fastsample.ops.lora.adapters import LowRank, PackedAdapters, pack_adapters
from fastsample.ops.lora.checks import check_operands
from fastsample.ops.lora.reference import lora_linear_reference
from fastsample.ops.lora.weights import PackedLinear, pack_linear
from fastsample.ops.memory import ordinary_tensors

# The place of the linear (None: all of them), and whether the adapters differ between samples.
_Key = tuple[int | None, bool]
_Forms = dict[_Key, tuple[PackedLinear, PackedAdapters | None]]

_Result = TypeVar("_Result")


def _untraced(method: Callable[..., _Result]) -> Callable[..., _Result]:
    """Runs a method outside the graph of torch.compile, and imports the compiler only where there is one.

    torch.compiler.disable as a decorator would load it for everybody: two seconds of every start.
    """

    @wraps(method)
    def run(*args: Any) -> _Result:
        return torch.compiler.disable(method)(*args) if torch.compiler.is_compiling() else method(*args)

    return run


class FrozenLinears(FrozenLayers):
    """The packed weights and adapters that the LoRALinears of one QKVProjection share, or a single LoRALinear has.

    The layers' parameters are the truth and the packed weights a copy, made where parameters arrive: at construction,
    after .to() and load_state_dict(), else at the next call. Without keep_weight it is the other way round: a parameter
    whose bits are packed keeps its shape, dtype and device over the memory of a single NaN.
    """

    def __init__(
        self, layers: Sequence[Layer], keep_weight: bool, capacity: int | None, weights_move: bool = False
    ) -> None:
        super().__init__(layers, capacity)
        self.weights_move = weights_move
        self._keep_weight = keep_weight
        self._packed: PackedLinear | None = None
        self._forms: _Forms = {}
        self._seen: list[Tensor] = []
        self._weight_marks: list[tuple[int, int, int]] = []
        self.pack()

    def __call__(self, x: Tensor, index: Tensor | None, i: int | None = None) -> tuple[Tensor, ...]:
        """The outputs of all linears for x, or of the i-th alone."""
        self.check_attached()
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            with torch.autocast(device, enabled=False):
                outputs = self(x.to(self.layers[i or 0].weight.dtype), index, i)
            dtype = torch.get_autocast_dtype(device)
            return tuple(y.to(dtype) for y in outputs)
        index = self.index if index is None else index
        if index is not None:
            self.check_not_merged()
        key = None if len(self.layers) == 1 else i, index is not None
        if self._packed is not None and not torch.compiler.is_compiling():
            self._check_unchanged()
            self._refresh_if_trained()
        if self.weights_move:
            return self._from_parameters(x, index, i)
        forms = self._forms
        packed, adapters = forms[key] if key in forms else self._prepare(key)
        if adapters is None:
            if index is not None:
                self.check_index(x, index)
            return lora_linear(x, packed)
        live = self._live()
        if live or (torch.is_grad_enabled() and x.requires_grad):
            check_operands(x, packed, adapters, index)
            groups = self._groups(key) if live else adapters.groups
            weights = self.weights() if i is None else [self.weight(i)]
            return lora_linear_reference(x, weights, packed.bias, groups, index)
        return lora_linear(x, packed, adapters, adapter_index=index)

    def _from_parameters(self, x: Tensor, index: Tensor | None, i: int | None) -> tuple[Tensor, ...]:
        """The outputs by the weights that hooks have brought to where x is."""
        index = None if index is None else index.to(x.device)
        if index is not None:
            self.check_index(x, index)
        groups = [] if self.unmerged else self.adapters.groups(per_sample=index is not None)
        outputs: list[Tensor] = []
        for place in range(len(self.layers)) if i is None else [i]:
            weight, bias = self.layers[place].weight.detach(), self.layers[place].bias
            own = [[group[place]] for group in groups]
            outputs += lora_linear_reference(x, [weight], None if bias is None else bias.detach(), own, index)
        return tuple(outputs)

    def repack(self) -> None:
        """Takes the parameters as they are now, packed unless hooks still move them."""
        self.weights_move = self.weights_move and any(moves(layer) for layer in self.layers)
        self.pack()

    def expect_moves(self) -> None:
        with LOCK:
            super().expect_moves()
            self._packed, self._forms = None, {}

    def pack(self) -> None:
        """Takes the parameters as they are now."""
        with LOCK:
            self.check_attached()
            self.restore()
            if self.weights_move:
                return
            weights = [layer.weight for layer in self.layers]
            biases = [layer.bias for layer in self.layers]
            # Packed memory outlives the call that makes it, which may be in inference mode.
            with ordinary_tensors(), torch.no_grad():
                packed = pack_linear([w.data for w in weights], [None if b is None else b.data for b in biases])
                forms, whole = self._refreshed(packed, {}), [weight.data for weight in weights]
                try:
                    for weight in () if self._keep_weight else weights:
                        weight.data = weight.new_full((), float("nan")).expand(weight.shape)
                    self._seen = [p for p in (*weights, *biases) if p is not None]
                    self._weight_marks = [mark(parameter) for parameter in self._seen]
                    # Assigned last: other threads take what they read here for complete.
                    self._packed, self._forms = packed, forms
                except BaseException:
                    self._packed, self._forms = None, {}
                    for weight, data in zip(weights, whole, strict=True):
                        weight.data = data
                    raise

    def restore(self) -> None:
        with LOCK:
            if self.released:
                weights = [self._unpacked(i) for i in range(len(self.layers))]
                for layer, weight in zip(self.layers, weights, strict=True):
                    layer.weight.data = weight
                self._packed, self._forms = None, {}

    def free(self) -> None:
        super().free()
        self._packed, self._forms, self._seen = None, {}, []

    def changed(self, i: int) -> None:
        if self._packed is not None and self._marks() == self._weight_marks:
            return
        self._packed, self._forms = None, {}
        kinds = {(layer.weight.dtype, layer.weight.device) for layer in self.layers}
        # A module tree moves its layers one by one: only after the last have all of them moved.
        if i == len(self.layers) - 1 and len(kinds) == 1:
            self.pack()

    def weight(self, i: int) -> Tensor:
        """The i-th layer's weight, also where its parameter has no storage."""
        self.check_attached()
        return self._unpacked(i) if self.released else self.layers[i].weight.detach()

    def parameters(self, i: int) -> dict[str, nn.Parameter | None]:
        with LOCK:
            self.check_attached()
            parameters = self.layers[i]._parameters
            if not self.released:
                return parameters
            return {**parameters, "weight": nn.Parameter(self.weight(i), self.layers[i].weight.requires_grad)}

    def weights(self) -> list[Tensor]:
        return [self.weight(i) for i in range(len(self.layers))]

    @_untraced
    def _unpacked(self, i: int) -> Tensor:
        # Read once: a detach in another thread puts None in its place, after the weights.
        packed, weight = self._packed, self.layers[i].weight
        if packed is None or mark(weight) == self._weight_marks[i]:
            return weight.detach() if packed is None else packed.linear(i).unpack()[0]
        # A weight that was put in the packed one's place is the user's. But where the replaced module has been moved or
        # cast, it moved only the NaN that stands for the packed weight.
        moved = weight.shape == (packed.out_features[i], packed.in_features) and _is_nan(weight)
        return packed.linear(i).unpack()[0].to(weight) if moved else weight.detach()

    @_untraced
    def refresh(self) -> None:
        with LOCK:
            if self._packed is None:
                self._note_factors()
            else:
                self._forms.update(self._refreshed(self._packed, self._forms))

    def _refreshed(self, packed: PackedLinear, before: _Forms) -> _Forms:
        forms: _Forms = {}
        for key in sorted({(None, False), (None, True), *before}, key=lambda key: key[1]):
            forms[key] = self._form(packed, key, before, forms)
        self._note_factors()
        return forms

    @_untraced
    def _prepare(self, key: _Key) -> tuple[PackedLinear, PackedAdapters | None]:
        with LOCK:
            self.check_attached()
            if self._packed is None:
                self.pack()
            assert self._packed is not None
            if key not in self._forms:
                self._forms[key] = self._form(self._packed, key, {}, self._forms)
            return self._forms[key]

    def _form(
        self, packed: PackedLinear, key: _Key, before: _Forms, forms: _Forms
    ) -> tuple[PackedLinear, PackedAdapters | None]:
        """The packed form, in the memory of the form before it where that fits: a compiled model may know the address.

        `forms` has those already packed from the present adapters.
        """
        i, per_sample = key
        packed = packed if i is None else packed.linear(i)
        with ordinary_tensors(), torch.no_grad():
            if per_sample and len(self.adapters.active) == 1 and (i, False) in forms:
                return forms[i, False]
            groups = [] if self.unmerged else self._groups(key)
            if not any(low_rank for group in groups for low_rank in group):
                return packed, None
            ranks = tuple(tuple(len(low_rank.down) if low_rank else 0 for low_rank in group) for group in groups)
            _, old = before.get(key, (packed, None))
            if old is None or old.ranks != ranks:
                return packed, pack_adapters(packed, groups)
            old.update(packed, groups)
            return packed, old

    def _groups(self, key: _Key) -> list[list[LowRank | None]]:
        i, per_sample = key
        groups = self.adapters.groups(per_sample)
        return groups if i is None else [[group[i]] for group in groups]

    @property
    def released(self) -> bool:
        return not self._keep_weight and self._packed is not None

    def _marks(self) -> list[tuple[int, int, int]]:
        # Absent where torch's parametrizations have taken a parameter away.
        parameters = [layer._parameters.get("weight") for layer in self.layers]
        parameters += [layer._parameters.get("bias") for layer in self.layers]
        return [mark(parameter) for parameter in parameters if parameter is not None]

    def _check_unchanged(self) -> None:
        if self._marks() != self._weight_marks:
            self.check_attached()
            packed = self._packed
            if self._keep_weight and packed and any(layer.weight.device != packed.device for layer in self.layers):
                self.expect_moves()
                return
            shapes = ", ".join(str(tuple(layer.weight.shape)) for layer in self.layers)
            raise RuntimeError(
                f"the weight or bias of a linear {shapes} has changed since it was packed: call repack() on the layer "
                "to take it as it is now, or detach() before the change and attach() after it"
            )

    def _set_weights(self, weights: Sequence[Tensor]) -> None:
        # Locked, since a call in another thread that sees nothing packed would pack the parameters as they are then.
        with LOCK:
            self._packed = None
            super()._set_weights(weights)
            self.pack()

    def __getstate__(self) -> dict[str, Any]:
        lists = "_seen", "_weight_marks", "_factors", "_factor_marks"
        return {**self.__dict__, "_packed": None, "_forms": {}, **{name: [] for name in lists}}


def _is_nan(weight: Tensor) -> bool:
    """Whether every value is NaN; the first one nearly always tells."""
    values = weight.detach()
    return not values.is_meta and all(bool(part.float().isnan().all()) for part in (values[:1, :1], values))
