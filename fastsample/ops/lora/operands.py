"""What every implementation of lora_linear's product reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """A call of lora_linear on weights that lie row by row, in the order of the Triton launch's arguments.

    Attributes:
        x: (M, K), the rows of a sample behind one another; its last axis is dense.
        samples: over how many samples the rows are spread evenly.
        weights: (N_i, K) of every linear, one linear after the other.
        bias: all biases behind one another, or None.
        out_features: N_i.
        down, up, scale: of each group of adapters, as in PackedAdapters; empty without adapters.
        ranks: of each linear of each group, 0 where it has none.
        adapter_index: int64 (samples,), each -1 or a group, or None: the one group, if any, serves all.
        outputs: (..., N_i) of each linear, contiguous, M N_i elements.
    """

    x: Tensor
    samples: int
    weights: Tensor
    bias: Tensor | None
    out_features: Sequence[int]
    down: Sequence[Tensor]
    up: Sequence[Tensor]
    scale: Sequence[Tensor]
    ranks: Sequence[int]
    adapter_index: Tensor | None
    outputs: Sequence[Tensor]
