"""How matrices lie in memory for lora_linear: in the CPU kernels' layouts, or row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.ops.address import address
from fastsample.ops.backend import cpu_module

# Numbers from 0 on are the CPU kernels' own layouts; row by row a matrix is read by Triton's kernels, or by torch's own
# product.
ROWS, TORCH = -1, -2

# torch's switch for its own float32 products, by how many products of bfloat16 parts stand for one.
_PRODUCTS = {"tf32": 3, "bf16": 1}


def packed_size(n: int, k: int, layout: int) -> int:
    """The elements of a packed (n, k) matrix."""
    return cpu_module().lora_packed_size(n, k, layout) if layout >= 0 else n * k


def pack(matrix: Tensor, out: Tensor, layout: int) -> None:
    """Writes a matrix into `out`, of packed_size elements, in this layout."""
    if layout >= 0:
        matrix = matrix.contiguous().resolve_neg()
        source, to = address("weights", matrix), address("packed", out)
        cpu_module().lora_pack(source, *matrix.shape, layout, to, torch.get_num_threads())
    else:
        out.copy_(matrix.reshape(-1))


def unpack(data: Tensor, n: int, k: int, layout: int) -> Tensor:
    """The (n, k) matrix that `pack` wrote in one of the CPU kernels' layouts, bit for bit."""
    matrix = data.new_empty(n, k)
    source, to = address("packed", data), address("weights", matrix)
    cpu_module().lora_unpack(source, n, k, layout, to, torch.get_num_threads())
    return matrix


def products_of_parts() -> int:
    """How many products of bfloat16 parts stand for one of float32: 6, or as few as torch's own switch allows."""
    precision = getattr(torch.backends.mkldnn, "matmul", None)
    return _PRODUCTS.get(precision.fp32_precision, 6) if precision is not None else 6
