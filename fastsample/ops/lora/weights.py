"""Frozen weights, laid out once for the many calls of lora_linear."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsample.hints import hinting
from fastsample.ops import backend as backends
from fastsample.ops.address import check_dense
from fastsample.ops.backend import cpu_module
from fastsample.ops.dtypes import DTYPE_CODES
from fastsample.ops.lora.choice import BY_TORCH, chosen
from fastsample.ops.lora.layout import ROWS, TORCH, pack, packed_size, unpack
from fastsample.ops.memory import fresh
from fastsample.ops.tracing import traced, transformed


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
            run = torch.ops.fastsample.lora_unpack if op else unpack
            return tuple(run(part, n, self.in_features, self.layout) for part, n in parts)
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


@hinting()
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
    biases = [None] * len(weights) if biases is None else _listed("biases", biases)
    if len(biases) != len(weights):
        raise ValueError(f"biases has {len(biases)} entries for {len(weights)} weights")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _check_linear(i, weight, bias, weights[0])
    first = weights[0]
    layout = _layout(first)
    out_features, in_features = tuple(len(weight) for weight in weights), first.shape[1]
    sizes = tuple(packed_size(n, in_features, layout) for n in out_features)
    data = fresh(torch.Size((sum(sizes),)), first.dtype, first.device)
    for weight, part in zip(weights, data.split(sizes), strict=True):
        pack(weight.detach(), part, layout)
    return PackedLinear(data, _joined(biases, out_features, first), in_features, out_features, sizes, layout)


def _check_linear(i: int, weight: Any, bias: Any, first: Tensor) -> None:
    """Raises unless these are the i-th linear's weight and bias, and fit beside the first one's weight."""
    for name, tensor in (("weights", weight), ("biases", bias)):
        if (name == "weights" or tensor is not None) and not is_dense(tensor):
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


def _joined(biases: Sequence[Tensor | None], out_features: Sequence[int], weight: Tensor) -> Tensor | None:
    """The biases behind one another, zeros for absent ones; None where all are absent."""
    if all(bias is None for bias in biases):
        return None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.cat(
        [
            weight.new_zeros(n, dtype=dtype) if bias is None else bias.detach().to(dtype)
            for n, bias in zip(out_features, biases, strict=True)
        ]
    )


def _listed(name: str, tensors: object) -> list[Any]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
    return list(tensors)


def is_dense(tensor: object) -> bool:
    """Whether this is a floating-point tensor with strides."""
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout is torch.strided


def _has_triton(weights: Tensor) -> bool:
    """Whether Triton serves such weights here; asked when they are packed, since compiled code cannot find out.

    On NVIDIA GPUs before sm_80 it has no tensor cores, and torch's own products are faster.
    """
    if weights.dtype not in DTYPE_CODES or not backends._runs_on("triton", weights.device):
        return False
    return not weights.is_cuda or bool(torch.version.hip) or torch.cuda.get_device_capability(weights.device) >= (8, 0)


def _layout(weight: Tensor) -> int:
    if cpu_module() is None or not weight.is_cpu or weight.dtype not in DTYPE_CODES:
        return ROWS
    if chosen(weight.dtype) == BY_TORCH:
        return TORCH
    return int(cpu_module().lora_layout(DTYPE_CODES[weight.dtype]))


def _what(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
