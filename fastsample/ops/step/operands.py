"""What a step computes with, from the public op or the loop to the kernel in one tuple."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastsample.tables import Table


class Operands(NamedTuple):
    """What stays the same from row to row: all but the model's output, the row and given noise.

    Attributes:
        x: the state, (B, ...).
        table: the sampler's coefficients.
        keys: int64 (B,), what each sample's noise is drawn from; None where it is given or there is none.
        guidance: one weight per sample, (B,); None where the model is called without guidance.
        one_guidance: whether these are and stay equal; None: whether they are now.
        rescale: phi of guidance rescale.
        history: the entries of the last rows, the latest first, each like x.
        rows: int64 (B,), the row of each sample, read at every call; None where samples share one.
        out: receives x', a fresh tensor where None; may be x.
        x0_out: receives this row's entry; may be one of the history.
        input_out: receives the next model input, once or, with twice x's batch, twice.
        log_prob_out: (B,), receives the log density of what each sample's row draws.
    """

    x: Tensor
    table: Table
    keys: Tensor | None = None
    guidance: Tensor | None = None
    one_guidance: bool | None = None
    rescale: float = 0.0
    history: Sequence[Tensor] = ()
    rows: Tensor | None = None
    out: Tensor | None = None
    x0_out: Tensor | None = None
    input_out: Tensor | None = None
    log_prob_out: Tensor | None = None
