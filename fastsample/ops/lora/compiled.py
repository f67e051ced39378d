"""What torch.compile and other recorders see of lora_linear: registered ops, and the shapes of their results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsample.ops.lora.launch import launch_linears
from fastsample.ops.lora.layout import unpack

_linears = torch.library.custom_op("fastsample::lora_linear", launch_linears, mutates_args=())
_unpack = torch.library.custom_op("fastsample::lora_unpack", unpack, mutates_args=(), device_types="cpu")


@_linears.register_fake
def _shapes(x: Tensor, weights: Tensor, bias: Tensor | None, out_features: Sequence[int], *_: object) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], n)) for n in out_features]


@_unpack.register_fake
def _unpacked_shape(data: Tensor, n: int, k: int, layout: int) -> Tensor:
    return data.new_empty(n, k)
