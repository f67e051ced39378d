"""What a section of a benchmark has found, in a sentence for each pair that it compares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from benchmarks.common.harness import Spread
from benchmarks.common.report import OURS, Row

_COMPARED = ("slower", "faster", "no claim")  # the claims of rows whose ratio is one of times


def closing(rows: Sequence[Row]) -> str:
    """A sentence for each pair: how many times as fast one is, and in brackets from the least p20 to the greatest p80.

    Ratios are those that the harness forms within rounds. Of several cases it is the median of their medians. Where the
    brackets hold 1 nothing is claimed.

    Example:
        >>> print(closing([Row("loop", "1x4", "diffusers", 1, 2, 3, 40, 1, None, OURS, 41.2, 83.4, 127.0, "slower")]))
        fastsample is 83x faster than diffusers [41, 127]
    """
    pairs: dict[tuple[str, str], list[Spread]] = {}
    for pair, ratio in _times_as_fast(rows):
        pairs.setdefault(pair, []).append(ratio)
    return "\n".join(_sentence(one, other, ratios) for (one, other), ratios in pairs.items())


def _times_as_fast(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, str], Spread]]:
    """((one, another), how many times as fast the one is) of every comparison; fastsample is the one where it is in."""
    for row in rows:
        if row.claim not in _COMPARED or row.ratio_p20 is None or row.ratio_p50 is None or row.ratio_p80 is None:
            continue
        if row.baseline == OURS:
            yield (OURS, row.provider), Spread(row.ratio_p20, row.ratio_p50, row.ratio_p80)
        else:
            yield (row.provider, row.baseline), Spread(1 / row.ratio_p80, 1 / row.ratio_p50, 1 / row.ratio_p20)


def _sentence(one: str, other: str, ratios: Sequence[Spread]) -> str:
    low, middle, high = (
        min(ratio.p20 for ratio in ratios),
        median(ratio.p50 for ratio in ratios),
        max(ratio.p80 for ratio in ratios),
    )
    cases = f" in {len(ratios)} cases" if len(ratios) > 1 else ""
    if low > 1:
        return f"{one} is {_shown(middle)}x faster than {other} [{_shown(low)}, {_shown(high)}]{cases}"
    if high < 1:
        slower = f"{_shown(1 / middle)}x slower than {other} [{_shown(1 / high)}, {_shown(1 / low)}]"
        return f"{one} is {slower}{cases}"
    return f"{one} and {other}: {_shown(middle)}x as fast [{_shown(low)}, {_shown(high)}]{cases}, no claim"


def _shown(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
