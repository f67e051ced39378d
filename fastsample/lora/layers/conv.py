"""2-D convolutions with low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsample.lora.checks import check_capacity
from fastsample.lora.layers.adapted import AdaptedLayer, check_replaceable
from fastsample.lora.layers.frozen import FrozenLayers
from fastsample.lora.layers.slots import Layer, stacked
from fastsample.ops.lora.adapters import LowRank
from fastsample.ops.memory import ordinary_tensors


class LoRAConv2d(AdaptedLayer):
    """An nn.Conv2d with adapters: y = conv(x, W) + b + conv(conv(x, A) * factor, B), A of W's kernel, B of 1x1.

    Plain torch, the active adapters stacked along the rank.

    Example:
        >>> layer = LoRAConv2d.from_conv(nn.Conv2d(3, 5, 3, padding=1))
        >>> layer.add_adapter("style", [(torch.ones(2, 3, 3, 3), torch.ones(5, 2, 1, 1))])
        >>> layer(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 5, 8, 8])
    """

    _frozen: FrozenConv

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, capacity: int | None = None) -> LoRAConv2d:
        """Takes a convolution's place; see LoRALinear.from_linear.

        Raises:
            TypeError: for anything but a plain nn.Conv2d. ValueError: for one with groups, and a capacity below 1.
        """
        check_replaceable(conv, nn.Conv2d)
        if conv.groups != 1:
            raise ValueError(f"adapters need a convolution without groups, got {conv.groups}")
        check_capacity(capacity)
        layer = cls(conv)
        layer._frozen = FrozenConv([layer], capacity)
        return layer

    def forward(self, x: Tensor, adapter_index: Tensor | None = None) -> Tensor:
        """The convolution of x, (B, in, H, W); adapter_index as LoRALinear.forward's."""
        frozen = self._frozen
        frozen.check_attached()
        index = frozen.index if adapter_index is None else adapter_index
        if index is not None:
            frozen.check_not_merged()
            frozen.check_index(x, index)
            if x.ndim != 4:
                raise ValueError(f"adapter_index needs x of shape (B, in, H, W), got {tuple(x.shape)}")
        conv = self._replaced
        assert isinstance(conv, nn.Conv2d)
        y = conv._conv_forward(x, self.weight.detach(), None if self.bias is None else self.bias.detach())
        low_rank, owners = frozen.low_rank()
        if low_rank is None or owners is None:
            return y
        scale = low_rank.scale if index is None else torch.where(index[:, None] == owners, low_rank.scale, 0)
        t = conv._conv_forward(x, low_rank.down, None)
        return y + functional.conv2d(t * scale[..., None, None].to(t), low_rank.up)


class FrozenConv(FrozenLayers):
    """One convolution, the active adapters stacked along the rank."""

    def __init__(self, layers: Sequence[Layer], capacity: int | None) -> None:
        super().__init__(layers, capacity)
        self._stacked: tuple[LowRank | None, Tensor | None] = (None, None)

    def low_rank(self) -> tuple[LowRank | None, Tensor | None]:
        """The active adapters stacked along the rank, and for each rank the place of its adapter among them."""
        if not torch.compiler.is_compiling():
            self._refresh_if_trained()
        return self._stack() if self._live() else self._stacked

    def refresh(self) -> None:
        """Stacks the active adapters anew."""
        with ordinary_tensors(), torch.no_grad():
            self._stacked = self._stack()
        self._note_factors()

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
