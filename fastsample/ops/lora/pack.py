"""Frozen weights and adapters, laid out once for the many calls of lora_linear."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsample.kernels.lora_layout import RANK_STEP
from fastsample.ops import backend as backends
from fastsample.ops.address import address, check_dense
from fastsample.ops.backend import cpu_module
from fastsample.ops.lora.choice import BY_TORCH, DTYPES, chosen
from fastsample.ops.memory import fresh
from fastsample.ops.tracing import traced, transformed

# How weights lie in memory: numbers from 0 on are the CPU kernels' own layouts; row by row they are read by Triton's
# kernels, or by torch's own product.
ROWS, TORCH = -1, -2


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


class PackedLinear:
    """The weights of one or several linears that read the same input, laid out for lora_linear.

    On a CPU with compiled kernels they lie in panels of 32 columns. Where it has AMX, float32 and float16 are split
    into bfloat16 parts: a float32 weight then takes 6 bytes, a float16 one 4. Elsewhere, and where torch multiplies
    faster, they lie row by row.

    Attributes:
        data: all weights, one linear after the other.
        bias: the biases behind one another, shape (sum of out_features,), in float32 (float64 beside float64); None
            where no linear has one.
        in_features: K.
        out_features: N of each linear.
        sizes: of each linear, the elements of data.
        layout: how data is laid out: ROWS, TORCH or one of the CPU kernels' layouts.
        offers: the backends that have kernels for such weights, beside the reference.
    """

    def __init__(
        self,
        data: Tensor,
        bias: Tensor | None,
        in_features: int,
        out_features: tuple[int, ...],
        sizes: tuple[int, ...],
        layout: int,
    ) -> None:
        self.data, self.bias, self.layout = data, bias, layout
        self.in_features, self.out_features, self.sizes = in_features, out_features, sizes
        self.offers = (*(("cpu",) if layout != ROWS else ()), *(("triton",) if _has_triton(data) else ()))

    @property
    def native(self) -> bool:
        """Whether data is in one of the CPU kernels' layouts."""
        return self.layout >= 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of every x."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.data.device

    def unpack(self) -> tuple[Tensor, ...]:
        """The weights, (N, K) each, bit for bit as they were packed."""
        parts = zip(self.data.split(self.sizes), self.out_features, strict=True)
        if self.native:
            # The op, whose every call imports torch's compiler, for those who record it and for packs without values.
            op = traced(self.data) or transformed() or not self.data.is_cpu
            unpack = torch.ops.fastsample.lora_unpack if op else _unpack
            return tuple(unpack(part, n, self.in_features, self.layout) for part, n in parts)
        return tuple(part.reshape(n, self.in_features) for part, n in parts)

    def by_rows(self) -> PackedLinear:
        """The same weights in the layout of Triton's kernels."""
        if self.layout == ROWS:
            return self
        data = torch.cat([weight.reshape(-1) for weight in self.unpack()])
        sizes = tuple(n * self.in_features for n in self.out_features)
        return PackedLinear(data, self.bias, self.in_features, self.out_features, sizes, ROWS)

    def linear(self, i: int) -> PackedLinear:
        """The i-th linear alone, on the same memory."""
        first, n = sum(self.out_features[:i]), self.out_features[i]
        bias = None if self.bias is None else self.bias[first : first + n]
        data = self.data.split(self.sizes)[i]
        return PackedLinear(data, bias, self.in_features, (n,), (self.sizes[i],), self.layout)


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
        self._up_sizes = [[_packed_size(n, r, layout) for n, r in zip(ns, own, strict=True)] for own in widths]
        self.down = [new(_packed_size(sum(own), k, layout)) for own in widths]
        self.up = [new(sum(sizes)) for sizes in self._up_sizes]
        self.scale = [new(sum(own), dtype=torch.float32) for own in widths]
        self._write(packed, groups)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._versions = [_version(factor) for factor in self._factors]  # a copy's tensors count anew

    def belongs_to(self, packed: PackedLinear) -> bool:
        """Whether these were packed for linears of the same shapes, dtype, device and layout."""
        return self._fits == _kind(packed)

    def requires_grad(self) -> bool:
        """Whether a factor requires gradients now."""
        return any(factor.requires_grad for factor in self._factors)

    def changed(self) -> bool:
        """Whether a factor has been written since it was packed."""
        return [_version(factor) for factor in self._factors] != self._versions

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
            wide = [None if one is None else _wide(one, packed) for one in group]
            present = [one for one in wide if one is not None]
            if present:
                down, scale = torch.cat([one.down for one in present]), torch.cat([one.scale for one in present])
                written.append((i, down, [None if one is None else one.up for one in wide], scale))
        for i, down, ups, scale in written:
            _pack(down, self.down[i], packed.layout)
            for up, part in zip(ups, self.up[i].split(self._up_sizes[i]), strict=True):
                if up is not None:
                    _pack(up, part, packed.layout)
            self.scale[i].copy_(scale)
        self.groups = tuple(tuple(group) for group in groups)
        self._factors = [factor for group in self.groups for one in group if one is not None for factor in one]
        self._versions = [_version(factor) for factor in self._factors]
        self.trainable = self.requires_grad()


def pack_linear(weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None) -> PackedLinear:
    """Lays out the weights of linears that read the same input.

    Args:
        weights: (N_i, K) each; one dtype and device. float32, float16 and bfloat16 on the CPU get the kernels' layout.
        biases: (N_i,) each or None.

    Raises:
        ValueError: for weights that do not share K, dtype and device, an empty one, and a bias that does not fit.
            TypeError: for weights that are not floating point.

    Example:
        >>> packed = pack_linear([torch.eye(3), torch.ones(2, 3)])
        >>> packed.out_features, torch.equal(packed.unpack()[1], torch.ones(2, 3))
        ((3, 2), True)
    """
    weights = _listed("weights", weights)
    if not weights:
        raise ValueError("weights holds no linear")
    first = weights[0]
    biases = [None] * len(weights) if biases is None else _listed("biases", biases)
    if len(biases) != len(weights):
        raise ValueError(f"biases has {len(biases)} entries for {len(weights)} weights")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        for name, tensor in (("weights", weight), ("biases", bias)):
            if (name == "weights" or tensor is not None) and not _is_dense(tensor):
                raise TypeError(f"{name}[{i}] must be a dense floating-point tensor")
            if tensor is not None and not tensor.is_meta:
                check_dense(f"{name}[{i}]", tensor)
        if weight.ndim != 2 or weight.numel() == 0:
            raise ValueError(f"weights[{i}] must have shape (out, in), got {tuple(weight.shape)}")
        if weight.shape[1] != first.shape[1] or weight.dtype != first.dtype or weight.device != first.device:
            raise ValueError(
                f"weights that read one input share in_features, dtype and device: weights[0] is {_what(first)}, "
                f"weights[{i}] {_what(weight)}"
            )
        if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
            raise ValueError(f"biases[{i}] is {_what(bias)}, its weight {_what(weight)}")
    layout = _layout(first)
    out_features, in_features = tuple(len(weight) for weight in weights), first.shape[1]
    sizes = tuple(_packed_size(n, in_features, layout) for n in out_features)
    data = fresh(torch.Size((sum(sizes),)), first.dtype, first.device)
    for weight, part in zip(weights, data.split(sizes), strict=True):
        _pack(weight.detach(), part, layout)
    bias = None
    if any(one is not None for one in biases):
        dtype = torch.promote_types(first.dtype, torch.float32)
        bias = torch.cat(
            [
                first.new_zeros(n, dtype=dtype) if one is None else one.detach().to(dtype)
                for n, one in zip(out_features, biases, strict=True)
            ]
        )
    return PackedLinear(data, bias, in_features, out_features, sizes, layout)


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
        for i, (one, n) in enumerate(zip(group, packed.out_features, strict=True)):
            if one is None:
                continue
            if not isinstance(one, LowRank):
                raise TypeError(f"groups[{g}][{i}] must be a LowRank or None, got {type(one).__name__}")
            if not all(_is_dense(factor) for factor in one):
                raise TypeError(f"groups[{g}][{i}]: down, up and scale must be dense floating-point tensors")
            for name, factor in zip(LowRank._fields, one, strict=True):
                if not factor.is_meta:
                    check_dense(f"groups[{g}][{i}].{name}", factor)
            r = one.down.shape[0] if one.down.ndim else 0
            fits = one.down.shape == (r, packed.in_features) and one.up.shape == (n, r)
            if not fits or one.scale.shape not in ((), (r,)):
                raise ValueError(
                    f"groups[{g}][{i}]: down {tuple(one.down.shape)}, up {tuple(one.up.shape)} and scale "
                    f"{tuple(one.scale.shape)} do not fit a linear of {packed.in_features} inputs and {n} outputs"
                )
            if any(factor.is_meta and not packed.data.is_meta for factor in one):
                raise ValueError(f"groups[{g}][{i}] has no values: it lies on the meta device")


def _listed(name: str, given: object) -> list[Any]:
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be a list of tensors, got {type(given).__name__}")
    return list(given)


def _has_triton(weights: Tensor) -> bool:
    """Whether Triton serves such weights here; asked when they are packed, since compiled code cannot find out.

    On NVIDIA GPUs before sm_80 it has no tensor cores, and torch's own products are faster.
    """
    if weights.dtype not in DTYPES or not backends._runs_on("triton", weights.device):
        return False
    return not weights.is_cuda or bool(torch.version.hip) or torch.cuda.get_device_capability(weights.device) >= (8, 0)


def _wide(one: LowRank, packed: PackedLinear) -> LowRank:
    """In the weights' dtype, on their device, a scale for each rank, zeros up to the rank that there is memory for."""
    down, up = one.down.to(packed.data), one.up.to(packed.data)
    scale = one.scale.detach().to(packed.device, torch.float32).expand(len(down))
    missing, pad = _missing(len(down), packed.layout), torch.nn.functional.pad
    if not missing:
        return LowRank(down, up, scale)
    return LowRank(pad(down, (0, 0, 0, missing)), pad(up, (0, missing)), pad(scale, (0, missing)))


def _missing(rank: int, layout: int) -> int:
    return -rank % RANK_STEP if layout == ROWS else 0


def _is_dense(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout is torch.strided


def _ranks(groups: Sequence[Group]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(0 if one is None else len(one.down) for one in group) for group in groups)


def _kind(packed: PackedLinear) -> tuple[object, ...]:
    return packed.in_features, packed.out_features, packed.data.dtype, packed.data.device, packed.layout


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _layout(weight: Tensor) -> int:
    if cpu_module() is None or not weight.is_cpu or weight.dtype not in DTYPES:
        return ROWS
    if chosen(weight.dtype) == BY_TORCH:
        return TORCH
    return int(cpu_module().lora_layout(DTYPES[weight.dtype]))


def _packed_size(n: int, k: int, layout: int) -> int:
    return cpu_module().lora_packed_size(n, k, layout) if layout >= 0 else n * k


def _pack(weight: Tensor, out: Tensor, layout: int) -> None:
    if layout >= 0:
        weight = weight.contiguous().resolve_neg()
        source, to = address("weights", weight), address("packed", out)
        cpu_module().lora_pack(source, *weight.shape, layout, to, torch.get_num_threads())
    else:
        out.copy_(weight.reshape(-1))


def _unpack(data: Tensor, n: int, k: int, layout: int) -> Tensor:
    weight = data.new_empty(n, k)
    source, to = address("packed", data), address("weights", weight)
    cpu_module().lora_unpack(source, n, k, layout, to, torch.get_num_threads())
    return weight


_registered = torch.library.custom_op("fastsample::lora_unpack", _unpack, mutates_args=(), device_types="cpu")


@_registered.register_fake
def _unpacked_shape(data: Tensor, n: int, k: int, layout: int) -> Tensor:
    return data.new_empty(n, k)


def _what(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
