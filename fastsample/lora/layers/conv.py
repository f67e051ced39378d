"""Convolutions with low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from fastsample.lora.checks import check_capacity
from fastsample.lora.layers.adapted import AdaptedLayer, check_replaceable
from fastsample.lora.layers.frozen import FrozenLayers
from fastsample.lora.layers.slots import Layer, stacked
from fastsample.ops.lora.adapters import LowRank
from fastsample.ops.memory import ordinary_tensors

_Layer = TypeVar("_Layer", bound="LoRAConv")


class LoRAConv(AdaptedLayer, _ConvNd):
    """A convolution with adapters: y = conv(x, W) + b + conv(conv(x, A) * factor, B), A of W's kernel, B of size 1.

    Plain torch, the active adapters stacked along the rank. Where the convolution has groups, A reads all channels as
    PEFT's does, and B may have PEFT's shape (out, r / groups, ...): each group reads its part of the rank.
    """

    # The torch convolution in whose place such a layer stands, and that convolution as a function.
    _replaces: ClassVar[type[_ConvNd]]
    _convolve: ClassVar[Any]
    _frozen: FrozenConv

    @classmethod
    def _made(
        cls: type[_Layer], conv: _ConvNd, capacity: int | None = None, weights_move: bool | None = None
    ) -> _Layer:
        check_replaceable(conv, cls._replaces, hooked=weights_move is not None)
        check_capacity(capacity)
        layer = cls._in_place_of(conv)
        layer._frozen = FrozenConv([layer], capacity)
        layer._frozen.weights_move = bool(weights_move)
        return layer

    def forward(self, x: Tensor, adapter_index: Tensor | None = None) -> Tensor:
        """The convolution of x, (B, in, ...); adapter_index as LoRALinear.forward's."""
        frozen = self._frozen
        frozen.check_attached()
        index = frozen.index if adapter_index is None else adapter_index
        weight, bias = self.weight, self.bias
        if index is not None:
            frozen.check_not_merged()
            frozen.check_index(x, index)
            if x.ndim != weight.ndim:
                raise ValueError(f"adapter_index needs x of {weight.ndim} axes, samples first, got {tuple(x.shape)}")
        y = self._conv_forward(x, weight.detach(), None if bias is None else bias.detach())
        low_rank, owners = frozen.low_rank()
        if low_rank is None or owners is None:
            return y
        scale = low_rank.scale
        if index is not None:
            scale = torch.where(index.to(owners.device)[:, None] == owners, scale, 0)
        t = self._shrunk(x, low_rank.down)
        return y + self._convolve(t * scale.reshape(*scale.shape, *(1,) * (weight.ndim - 2)).to(t), low_rank.up)

    def _shrunk(self, x: Tensor, down: Tensor) -> Tensor:
        """x through A, which strides, pads and dilates as the convolution does but has no groups."""
        if self.groups == 1:
            return self._conv_forward(x, down, None)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        t: Tensor = self._convolve(x, down, None, self.stride, padding, self.dilation)
        return t


class LoRAConv1d(LoRAConv, nn.Conv1d):
    """An nn.Conv1d with adapters; see LoRAConv2d."""

    _replaces, _convolve = nn.Conv1d, staticmethod(functional.conv1d)

    @classmethod
    def from_conv(cls, conv: nn.Conv1d, *, capacity: int | None = None) -> LoRAConv1d:
        """See LoRAConv2d.from_conv."""
        return cls._made(conv, capacity)


class LoRAConv2d(LoRAConv, nn.Conv2d):
    """An nn.Conv2d with adapters: y = conv(x, W) + b + conv(conv(x, A) * factor, B), A of W's kernel, B of 1x1.

    Plain torch, the active adapters stacked along the rank. Where the convolution has groups, A reads all channels as
    PEFT's does, and B may have PEFT's shape (out, r / groups, 1, 1): each group reads its part of the rank.

    Example:
        >>> layer = LoRAConv2d.from_conv(nn.Conv2d(3, 5, 3, padding=1))
        >>> layer.add_adapter("style", [(torch.ones(2, 3, 3, 3), torch.ones(5, 2, 1, 1))])
        >>> layer(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 5, 8, 8])
    """

    _replaces, _convolve = nn.Conv2d, staticmethod(functional.conv2d)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, capacity: int | None = None) -> LoRAConv2d:
        """Takes a convolution's place; see LoRALinear.from_linear.

        Raises:
            TypeError: for anything but a plain nn.Conv2d. ValueError: for a capacity below 1.
        """
        return cls._made(conv, capacity)


class LoRAConv3d(LoRAConv, nn.Conv3d):
    """An nn.Conv3d with adapters; see LoRAConv2d."""

    _replaces, _convolve = nn.Conv3d, staticmethod(functional.conv3d)

    @classmethod
    def from_conv(cls, conv: nn.Conv3d, *, capacity: int | None = None) -> LoRAConv3d:
        """See LoRAConv2d.from_conv."""
        return cls._made(conv, capacity)


CONVOLUTIONS = (LoRAConv1d, LoRAConv2d, LoRAConv3d)


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The torch module in whose place an adapted layer could stand here: nn.Linear, if it is no convolution."""
    return next((conv._replaces for conv in CONVOLUTIONS if isinstance(module, conv._replaces)), nn.Linear)


def conv_layer(conv: nn.Module, weights_move: bool) -> LoRAConv:
    """The layer that takes a convolution's place, which hooks may stand around."""
    [kind] = [kind for kind in CONVOLUTIONS if isinstance(conv, kind._replaces)]
    assert isinstance(conv, _ConvNd)
    return kind._made(conv, weights_move=weights_move)


class FrozenConv(FrozenLayers):
    """One convolution, the active adapters stacked along the rank."""

    def __init__(self, layers: Sequence[Layer], capacity: int | None) -> None:
        super().__init__(layers, capacity)
        self._stacked: tuple[LowRank | None, Tensor | None] = (None, None)

    def low_rank(self) -> tuple[LowRank | None, Tensor | None]:
        """The active adapters stacked along the rank, and for each rank the place of its adapter among them."""
        if not torch.compiler.is_compiling():
            self._refresh_if_trained()
        low_rank = self._stacked[0]
        weight = self.layers[0]._parameters["weight"]
        if low_rank is not None and weight is not None and low_rank.down.device != weight.device:
            self.expect_moves()
        return self._stack() if self.weights_move or self._live() else self._stacked

    def refresh(self) -> None:
        """Stacks the active adapters anew."""
        with ordinary_tensors(), torch.no_grad():
            self._stacked = (None, None) if self.weights_move else self._stack()
        self._note_factors()

    def expect_moves(self) -> None:
        """As FrozenLayers.expect_moves; each call makes its stack."""
        super().expect_moves()
        self._stacked = (None, None)

    def free(self) -> None:
        """As FrozenLayers.free; the stack goes as well."""
        super().free()
        self._stacked = (None, None)

    def changed(self, i: int) -> None:
        """The weight's dtype or device may be another now."""
        self.refresh()

    def _stack(self) -> tuple[LowRank | None, Tensor | None]:
        low_ranks = [] if self.unmerged else [low_rank for [low_rank] in self.adapters.groups(per_sample=True)]
        owners = [
            torch.full_like(low_rank.scale, place, dtype=torch.int64)
            for place, low_rank in enumerate(low_ranks)
            if low_rank is not None
        ]
        return stacked(low_ranks), torch.cat(owners) if owners else None
