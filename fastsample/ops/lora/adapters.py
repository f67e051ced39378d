"""Low-rank factors, laid out once beside the frozen weights that they are added to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsample.hints import hinting
from fastsample.kernels.lora.layout import RANK_STEP
from fastsample.ops.address import check_dense
from fastsample.ops.lora.layout import ROWS, pack, packed_size
from fastsample.ops.lora.weights import PackedLinear, is_dense
from fastsample.versions import version_of


class LowRank(NamedTuple):
    """One adapter's part in one linear: it adds (x down^T * scale) up^T.

    Attributes:
        down: A, shape (r, in).
        up: B, shape (out, r).
        scale: float32, one number or one per rank, shape () or (r,): weight * alpha / r.
    """

    down: Tensor
    up: Tensor
    scale: Tensor


# One adapter (or several, stacked along the rank) in each of the linears packed together; None leaves a linear alone.
Group = Sequence[LowRank | None]


class PackedAdapters:
    """Low-rank factors beside a PackedLinear; lora_linear adds one group to every sample, or another to each.

    The factors are copied. Where one is written later (a training step), update() takes it in; until then lora_linear
    refuses.

    Attributes:
        groups: the factors as they were given; gradients and the reference go through them.
        down, up, scale: of each group, packed.
        ranks: of each group, the rank in each linear, 0 where it has none; flat_ranks has them all in one tuple.
        trainable: whether a factor required gradients when it was packed. Compiled code asks this, not the factors, so
            that it need not be compiled again for others.
    """

    def __init__(self, packed: PackedLinear, groups: Sequence[Group]) -> None:
        _check_groups(packed, groups)
        self.ranks = _ranks(groups)
        self.flat_ranks = tuple(rank for ranks in self.ranks for rank in ranks)
        self._fits = _kind(packed)
        new, layout = packed.data.new_empty, packed.layout
        k, ns = packed.in_features, packed.out_features
        widths = [[rank + _missing(rank, layout) for rank in ranks] for ranks in self.ranks]
        self._up_sizes = [[packed_size(n, r, layout) for n, r in zip(ns, ranks, strict=True)] for ranks in widths]
        self.down = [new(packed_size(sum(ranks), k, layout)) for ranks in widths]
        self.up = [new(sum(sizes)) for sizes in self._up_sizes]
        self.scale = [new(sum(ranks), dtype=torch.float32) for ranks in widths]
        self._write(packed, groups)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._versions = [version_of(factor) for factor in self._factors]  # a copy's tensors count anew

    def belongs_to(self, packed: PackedLinear) -> bool:
        """Whether these were packed for linears of the same shapes, dtype, device and layout."""
        return self._fits == _kind(packed)

    def requires_grad(self) -> bool:
        """Whether a factor requires gradients now."""
        return any(factor.requires_grad for factor in self._factors)

    def changed(self) -> bool:
        """Whether a factor has been written since it was packed."""
        return [version_of(factor) for factor in self._factors] != self._versions

    def update(self, packed: PackedLinear, groups: Sequence[Group]) -> None:
        """Takes other factors of the same ranks into the same memory, for a compiled model that knows its addresses.

        No call may run on them meanwhile.

        Raises:
            ValueError, TypeError: for linears or ranks other than before, and factors that do not fit. Nothing has
                changed then.
        """
        if not self.belongs_to(packed):
            raise ValueError("update needs the linears that the adapters were packed for")
        _check_groups(packed, groups)
        if _ranks(groups) != self.ranks:
            raise ValueError(f"update keeps the ranks {self.ranks}, got {_ranks(groups)}")
        self._write(packed, groups)

    @torch.no_grad()
    def _write(self, packed: PackedLinear, groups: Sequence[Group]) -> None:
        written = []
        for i, group in enumerate(groups):
            wide = [None if low_rank is None else _widened(low_rank, packed) for low_rank in group]
            present = [low_rank for low_rank in wide if low_rank is not None]
            if present:
                down = torch.cat([low_rank.down for low_rank in present])
                scale = torch.cat([low_rank.scale for low_rank in present])
                written.append((i, down, [None if low_rank is None else low_rank.up for low_rank in wide], scale))
        for i, down, ups, scale in written:
            pack(down, self.down[i], packed.layout)
            for up, part in zip(ups, self.up[i].split(self._up_sizes[i]), strict=True):
                if up is not None:
                    pack(up, part, packed.layout)
            self.scale[i].copy_(scale)
        self.groups = tuple(tuple(group) for group in groups)
        present = [low_rank for group in self.groups for low_rank in group if low_rank is not None]
        self._factors = [factor for low_rank in present for factor in low_rank]
        self._versions = [version_of(factor) for factor in self._factors]
        self.trainable = self.requires_grad()


@hinting()
def pack_adapters(packed: PackedLinear, groups: Sequence[Group]) -> PackedAdapters:
    """Lays out groups of low-rank factors beside the linears they belong to.

    Args:
        packed: the linears.
        groups: for each group one LowRank or None per linear. Factors of another dtype are rounded to the weights'.

    Raises:
        ValueError: for a group without one entry per linear, and factors whose shapes do not fit.
    """
    return PackedAdapters(packed, groups)


def _check_groups(packed: PackedLinear, groups: Sequence[Group]) -> None:
    if not isinstance(packed, PackedLinear):
        raise TypeError(f"packed must be what pack_linear returns, got {type(packed).__name__}")
    if not isinstance(groups, list | tuple) or not all(isinstance(group, list | tuple) for group in groups):
        raise TypeError("groups must be a list of groups, each a list with one LowRank or None per linear")
    for g, group in enumerate(groups):
        if len(group) != len(packed.out_features):
            raise ValueError(f"groups[{g}] has {len(group)} entries for {len(packed.out_features)} linears")
        for i, (low_rank, n) in enumerate(zip(group, packed.out_features, strict=True)):
            if low_rank is not None:
                _check_low_rank(f"groups[{g}][{i}]", low_rank, n, packed)


def _check_low_rank(name: str, low_rank: LowRank, n: int, packed: PackedLinear) -> None:
    """Raises unless the factors fit a linear of n outputs among the packed ones."""
    if not isinstance(low_rank, LowRank):
        raise TypeError(f"{name} must be a LowRank or None, got {type(low_rank).__name__}")
    if not all(is_dense(factor) for factor in low_rank):
        raise TypeError(f"{name}: down, up and scale must be dense floating-point tensors")
    for field, factor in zip(LowRank._fields, low_rank, strict=True):
        if not factor.is_meta:
            check_dense(f"{name}.{field}", factor)
    down, up, scale = low_rank
    r = down.shape[0] if down.ndim else 0
    fits = down.shape == (r, packed.in_features) and up.shape == (n, r)
    if not fits or scale.shape not in ((), (r,)):
        raise ValueError(
            f"{name}: down {tuple(down.shape)}, up {tuple(up.shape)} and scale {tuple(scale.shape)} do not fit a "
            f"linear of {packed.in_features} inputs and {n} outputs"
        )
    if any(factor.is_meta and not packed.data.is_meta for factor in low_rank):
        raise ValueError(f"{name} has no values: it lies on the meta device")


def _ranks(groups: Sequence[Group]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(0 if low_rank is None else len(low_rank.down) for low_rank in group) for group in groups)


def _widened(low_rank: LowRank, packed: PackedLinear) -> LowRank:
    """The factors in the weights' dtype, on their device, a scale for each rank, zeros up to the rank in memory."""
    down, up = low_rank.down.to(packed.data), low_rank.up.to(packed.data)
    scale = low_rank.scale.detach().to(packed.device, torch.float32).expand(len(down))
    missing, pad = _missing(len(down), packed.layout), torch.nn.functional.pad
    if not missing:
        return LowRank(down, up, scale)
    return LowRank(pad(down, (0, 0, 0, missing)), pad(up, (0, missing)), pad(scale, (0, missing)))


def _missing(rank: int, layout: int) -> int:
    return -rank % RANK_STEP if layout == ROWS else 0


def _kind(packed: PackedLinear) -> tuple[object, ...]:
    return packed.in_features, packed.out_features, packed.data.dtype, packed.data.device, packed.layout
