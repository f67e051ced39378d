"""Which rows of a table a run visits, and which of them are guided."""

from __future__ import annotations

from fastsample.loop.guidance import GuidedRows
from fastsample.tables import Table

# The index of a row, the time that the model is given in it, whether it is guided, whether the row after it is, and the
# level (alpha, sigma) that it leads to. A plain tuple: a loop unpacks it in every row.
Visit = tuple[int, int | float, bool, bool, tuple[float, float]]


def row_schedule(table: Table, guidance: GuidedRows, first_row: int) -> list[Visit]:
    """The rows of a run from the first one on.

    Raises:
        ValueError: where guidance is asked for and no row is guided.
    """
    if guidance.weights is None and first_row == 0:
        return table.derived("rows", lambda own: _visits(own, [False] * len(own)))
    guided = [guidance.at(t) for t in table.times]
    if guidance.weights is not None and not any(guided):
        raise ValueError(
            f"{guidance.interval_name}={guidance.interval} holds none of the times {table.times[0]} .. "
            f"{table.times[-1]} that the model is given"
        )
    return _visits(table, guided)[first_row:]


def _visits(table: Table, guided: list[bool]) -> list[Visit]:
    return list(zip(range(len(table)), table.times, guided, [*guided[1:], False], table.levels, strict=True))
