"""The literature's findings beside ours, each with a verdict that follows from an interval and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.sections.improved_bits import difference
from benchmarks.sections.improved_data import BUNDLED, Data
from benchmarks.sections.improved_samples import LARGE, SMALL
from benchmarks.sections.quality_cases import LEARNED
from fastsample.evaluate import Figure

RE_FOUND, NOT_CLEAR, CONTRADICTED, MISSING = "re-found", "not clear", "contradicted", "not measured yet"
FAR = 2.0  # times the other's distance
EQUAL = 0.1  # of the gap at 10 calls
LITTLE = 0.25  # of the distance without skipping
SOURCES = (BUNDLED, "hybrid")
FIXED = (("fixed_small", SMALL), ("fixed_large", LARGE))


@dataclass(frozen=True)
class Finding:
    """What the literature says, our numbers, and the difference that decides.

    Attributes:
        statement: of the literature, with where we looked.
        numbers: what was compared.
        difference: the finding says that it is above 0, or, with a limit, below that.
        verdict: one of the four above.
    """

    statement: str
    numbers: str = ""
    difference: Figure | None = None
    verdict: str = MISSING


Measure = Callable[[Data], tuple[str, Figure, str]]


def findings(data: Data) -> list[Finding]:
    """All of them, in the page's order."""
    return [_finding(statement, measure, data) for statement, measure in _every()]


def minus(left: Figure, right: Figure, factor: float = 1.0) -> Figure:
    """left - factor right, of two figures whose errors are independent (Zou & Donner 2008).

    Each end of the interval takes the distances of both figures' ends as errors that add in squares. Where the errors
    are alike, as with common random numbers, the interval is wider than it had to be.
    """
    value = left.value - factor * right.value
    below = math.hypot(left.value - left.low, factor * (right.high - right.value))
    above = math.hypot(left.high - left.value, factor * (right.value - right.low))
    return Figure(value, value - below, value + above)


def positive(difference: Figure) -> str:
    """Re-found where the interval lies above 0, contradicted where it lies below."""
    return RE_FOUND if difference.low > 0 else CONTRADICTED if difference.high < 0 else NOT_CLEAR


def within(difference: Figure, limit: float, *, either: bool = False) -> str:
    """Re-found where the interval lies below the limit, with `either` above its negative too."""
    if difference.high < limit and (not either or difference.low > -limit):
        return RE_FOUND
    return CONTRADICTED if difference.low > limit or (either and difference.high < -limit) else NOT_CLEAR


def _finding(statement: str, measure: Measure, data: Data) -> Finding:
    try:
        return Finding(statement, *measure(data))
    except LookupError:
        return Finding(statement)


def _every() -> Iterator[tuple[str, Measure]]:
    for calls in (10, 20):
        for model in SOURCES:
            yield (
                f"DDIM far ahead of DDPM at {calls} calls ({model}): half its distance or less",
                partial(_ddim_far_ahead, model=model, calls=calls),
            )
    yield "DDIM and DDPM about equal at 1,000 calls (bundled): a tenth of the gap at 10 or less", _equal
    for calls in (50, 100):
        for model in SOURCES:
            yield (
                f"learned variance ahead of both fixed ones at {calls} calls ({model})",
                partial(_learned_ahead, model=model, calls=calls),
            )
    for calls in (50, 100):
        yield (
            f"learned variance ahead of both fixed ones in bits, {calls} steps (bundled)",
            partial(_learned_bits_bundled, calls=calls),
        )
    for place, what in enumerate(("respaced", "whole")):
        yield (
            f"learned variance ahead of both fixed ones in bits, {what} process (hybrid)",
            partial(_learned_bits, place=place),
        )
    for calls in (10, 20):
        for model in SOURCES:
            yield (
                f"DDIM ahead of the learned variance at {calls} calls ({model})",
                partial(_ddim_ahead, model=model, calls=calls),
            )
    for place, what in enumerate(("respaced", "whole")):
        yield f"the hybrid loss ahead of simple in bits, {what} process", partial(_hybrid_bits, place=place)
    yield "importance sampling smoother than uniform timesteps on the vlb loss", _smoother
    yield "vlb with importance sampling ahead of hybrid in bits, whole process", partial(_bits, "hybrid")
    yield "vlb with importance sampling ahead of vlb without, in bits, whole process", partial(_bits, "vlb")
    yield "T = 4000 ahead of T = 1000 in bits, whole processes", _longer
    yield "cosine ahead of linear in bits, whole process", _cosine_bits
    yield "cosine ahead of linear in samples, 50 steps with the learned variance", _cosine_samples
    for model in ("linear", "hybrid"):
        yield (
            f"skipping the first 20 % costs little ({_SCHEDULES[model]}): a quarter of the distance or less",
            partial(_skipping, model=model),
        )


_SCHEDULES = {"linear": "linear schedule", "hybrid": "cosine schedule"}


def _ddim_far_ahead(data: Data, *, model: str, calls: int) -> tuple[str, Figure, str]:
    name, ddpm = _best_fixed(data, model, calls)
    ddim = data.distance(model, "DDIM", calls)
    gap = minus(ddpm, ddim, FAR)
    return f"{name} {_text(ddpm)}, twice DDIM's {_text(ddim)}", gap, positive(gap)


def _equal(data: Data) -> tuple[str, Figure, str]:
    at_10 = _kernel(data, SMALL, 10).value - _kernel(data, "DDIM", 10).value
    ddpm, ddim = _kernel(data, SMALL, 1000), _kernel(data, "DDIM", 1000)
    gap, limit = minus(ddpm, ddim), EQUAL * abs(at_10)
    numbers = f"kernel distances: {SMALL} {_text(ddpm)}, DDIM {_text(ddim)}; limit {limit:.3g}"
    return numbers, gap, within(gap, limit, either=True)


def _learned_ahead(data: Data, *, model: str, calls: int) -> tuple[str, Figure, str]:
    name, fixed = _best_fixed(data, model, calls)
    learned = data.distance(model, LEARNED, calls)
    gap = minus(fixed, learned)
    return f"{name} {_text(fixed)}, learned range {_text(learned)}", gap, positive(gap)


def _ddim_ahead(data: Data, *, model: str, calls: int) -> tuple[str, Figure, str]:
    learned, ddim = data.distance(model, LEARNED, calls), data.distance(model, "DDIM", calls)
    gap = minus(learned, ddim)
    return f"learned range {_text(learned)}, DDIM {_text(ddim)}", gap, positive(gap)


def _learned_bits_bundled(data: Data, *, calls: int) -> tuple[str, Figure, str]:
    variance = min((name for name, _ in FIXED), key=lambda name: data.bits_of(BUNDLED, name, calls).value)
    fixed, learned = (data.bits_of(BUNDLED, name, calls) for name in (variance, "learned_range"))
    gap = minus(fixed, learned)
    return f"{variance} {_text(fixed)}, learned_range {_text(learned)}", gap, positive(gap)


def _learned_bits(data: Data, *, place: int) -> tuple[str, Figure, str]:
    steps = data.steps_of("hybrid")[place]
    return _paired(data, ("hybrid", _best_variance(data, "hybrid", steps), steps), ("hybrid", "learned_range", steps))


def _hybrid_bits(data: Data, *, place: int) -> tuple[str, Figure, str]:
    steps = data.steps_of("simple")[place]
    return _paired(data, ("simple", _best_variance(data, "simple", steps), steps), ("hybrid", "learned_range", steps))


def _bits(other: str, data: Data) -> tuple[str, Figure, str]:
    steps = data.steps_of(other)[1]
    return _paired(data, (other, "learned_range", steps), ("vlb-importance", "learned_range", steps))


def _longer(data: Data) -> tuple[str, Figure, str]:
    short, long = data.steps_of("hybrid")[1], data.steps_of("hybrid-4000")[1]
    return _paired(data, ("hybrid", "learned_range", short), ("hybrid-4000", "learned_range", long))


def _cosine_bits(data: Data) -> tuple[str, Figure, str]:
    steps = data.steps_of("linear")[1]
    return _paired(data, ("linear", "learned_range", steps), ("hybrid", "learned_range", steps))


def _cosine_samples(data: Data) -> tuple[str, Figure, str]:
    steps = data.late_starts("linear")[0]
    linear, cosine = (data.distance(model, LEARNED, steps) for model in ("linear", "hybrid"))
    gap = minus(linear, cosine)
    return f"linear {_text(linear)}, cosine {_text(cosine)}", gap, positive(gap)


def _smoother(data: Data) -> tuple[str, Figure, str]:
    uniform, importance = data.spread("vlb"), data.spread("vlb-importance")
    gap = minus(uniform, importance)
    numbers = f"spread of log loss from step to step: uniform {_text(uniform)}, importance {_text(importance)}"
    return numbers, gap, positive(gap)


def _skipping(data: Data, *, model: str) -> tuple[str, Figure, str]:
    steps, _ = data.late_starts(model)
    whole, late = (data.distance(model, LEARNED, steps, skipped=share) for share in (0.0, 0.2))
    cost, limit = minus(late, whole), LITTLE * whole.value
    numbers = f"without the first 20 % {_text(late)}, whole {_text(whole)}; limit {limit:.3g}"
    return numbers, cost, within(cost, limit)


def _paired(data: Data, worse: tuple[str, str, int], better: tuple[str, str, int]) -> tuple[str, Figure, str]:
    gap = difference(data.each(*worse), data.each(*better))
    numbers = ", ".join(f"{who[0]} with {who[1]} {_text(data.bits_of(*who))}" for who in (worse, better))
    return numbers, gap, positive(gap)


def _best_fixed(data: Data, model: str, calls: int) -> tuple[str, Figure]:
    figures = {name: data.distance(model, name, calls) for _, name in FIXED}
    name = min(figures, key=lambda name: figures[name].value)
    return name, figures[name]


def _best_variance(data: Data, model: str, steps: int) -> str:
    return min((name for name, _ in FIXED), key=lambda name: data.bits_of(model, name, steps).value)


def _kernel(data: Data, sampler: str, calls: int) -> Figure:
    return data.distance(BUNDLED, sampler, calls, name="kernel", few=True)


def _text(figure: Figure) -> str:
    return f"{figure.value:.3g} ({figure.low:.3g} .. {figure.high:.3g})"
