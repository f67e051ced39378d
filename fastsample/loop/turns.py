"""The plans of a step that take turns, so that no row writes over an entry that a later one reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastsample.loop.model_input import ModelInput
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan
from fastsample.tables import Table


def plans_in_turn(
    inputs: Sequence[ModelInput],
    entries: Sequence[Tensor],
    table: Table,
    backend: str,
    *,
    writes_input: bool,
    rows: Sequence[Tensor] = (),
    **fixed: Any,
) -> list[StepPlan]:
    """One plan a turn, which are used in this order again and again.

    The plan of turn i steps the state of input i to that of input i + 1, reads the entries of turns i, i - 1, ... as
    far back as the table does, and keeps its own for turn i + 1, in the place of the oldest one.

    Args:
        inputs: one for all turns, whose state is stepped in place, or one a turn.
        entries: memory for them: none, one, or one a turn.
        table, backend: the rows to step by, and what runs them.
        writes_input: whether the step writes the next model input too.
        rows: where given, for each turn the row that each sample is at.
        **fixed: what all plans share, as in Operands.
    """
    plans = []
    for turn in range(max(len(inputs), len(entries))):
        own, following = inputs[turn % len(inputs)], inputs[(turn + 1) % len(inputs)]
        operands = Operands(
            own.state,
            table,
            history=tuple(entries[turn - back] for back in range(table.history)),
            rows=rows[turn] if rows else None,
            out=following.state,
            x0_out=entries[(turn + 1) % len(entries)] if entries else None,
            input_out=following.target if writes_input else None,
            **fixed,
        )
        plans.append(StepPlan(operands, backend))
    return plans
