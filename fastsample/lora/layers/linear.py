"""Linear layers with low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastsample.lora.checks import check_capacity
from fastsample.lora.layers.adapted import Adaptable, AdaptedLayer, check_replaceable
from fastsample.lora.layers.frozen_linears import FrozenLinears


class LoRALinear(AdaptedLayer, nn.Linear):
    """An nn.Linear with adapters, one pass for both.

        y = x W^T + b + sum_a weight_a * factor_a * (x A_a^T) B_a^T

    weight and bias are the original's Parameters under the original's names, and others can be assigned to the layer.
    They are frozen: they get no gradients, and where one has been written after packing, forward raises RuntimeError.
    It cannot see a write through `weight.data`, nor any change under torch.compile: call repack() after it.

    Calls may run in several threads; what changes the layer may not run beside one. Under autocast the product is
    still computed in the weights' dtype, and its result has autocast's.

    Example:
        >>> layer = LoRALinear.from_linear(nn.Linear(2, 3, bias=False))
        >>> layer.add_adapter("style", [(torch.ones(1, 2), torch.zeros(3, 1))], scale=0.5, alpha=8)
        >>> layer(torch.ones(4, 2)).shape, layer.adapters, list(layer.state_dict())
        (torch.Size([4, 3]), ('style',), ['weight'])
    """

    _frozen: FrozenLinears

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
        return self._frozen(x, adapter_index, self._i)[0]

    def repack(self) -> None:
        """Takes weight and bias as they are now."""
        self._frozen.repack()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Before the parameters are read: a detach in another thread gives them their weights back.
        released, weight = self._frozen.released, self._frozen.weight(self._i)
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

    _frozen: FrozenLinears

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
        projection._frozen = layers[0]._frozen
        for i, layer in enumerate(layers):
            projection.add_module(str(i), layer)
        return projection

    def linear(self, i: int) -> LoRALinear:
        """The i-th linear by itself, on the same packed memory and with the same adapters."""
        layer = self._frozen.layers[i]
        assert isinstance(layer, LoRALinear)
        return layer

    def forward(self, x: Tensor, adapter_index: Tensor | None = None) -> tuple[Tensor, ...]:
        """One output per linear; see LoRALinear.forward. The hooks of the single linears do not run."""
        return self._frozen(x, adapter_index)

    def repack(self) -> None:
        """Takes weights and biases as they are now."""
        self._frozen.repack()


def linear_layers(
    linears: Sequence[nn.Module], keep_weight: bool, capacity: int | None, weights_move: bool | None = None
) -> list[LoRALinear]:
    """LoRALinears with packed memory and adapters in common.

    Hooks may stand around a linear where `weights_move` is given: whether they, or others, move the weights.
    """
    for linear in linears:
        check_replaceable(linear, nn.Linear, hooked=weights_move is not None)
    check_capacity(capacity)
    layers = [LoRALinear._in_place_of(linear) for linear in linears]
    frozen = FrozenLinears(layers, keep_weight, capacity, bool(weights_move))
    for i, layer in enumerate(layers):
        layer._frozen, layer._i = frozen, i
    return layers
