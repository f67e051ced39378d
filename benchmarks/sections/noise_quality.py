"""Are they independent standard normals? Moments, tails, correlations and a Kolmogorov-Smirnov test, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.options import Shape, refuse
from fastsample import ops

SHAPE, QUICK_SHAPE = (16, 3, 512, 512), (16, 3, 64, 64)
SEED = 20240601
TAILS = (3.0, 4.0, 5.0)


@dataclass(frozen=True)
class Finding:
    """One test.

    Attributes:
        test: its name.
        value, expected: the statistic, and what true normals give on average.
        z: the difference in standard errors; None for Kolmogorov-Smirnov.
        p: how likely true normals differ as much or more.
        n: values, or pairs, that went in.
    """

    test: str
    value: float
    expected: float
    z: float | None
    p: float
    n: int


def study(shape: Shape) -> list[Finding]:
    """All tests on the initial noise of a batch of this shape, the first places of one seed."""
    try:
        from scipy.stats import kstest
    except ImportError as error:
        refuse(f"--quality needs scipy: {error}")
    x = _draw(shape)
    findings = [*_moments(x), *_tails(x), *_correlations(x, shape)]
    ks = kstest(x.ravel(), "norm")
    return [*findings, Finding("Kolmogorov-Smirnov", float(ks.statistic), 0.0, None, float(ks.pvalue), x.size)]


def table(findings: Sequence[Finding]) -> str:
    """The findings as text, and what the smallest p among so many tests means."""
    lines = [f"{'test':<36} {'value':>12} {'expected':>12} {'z':>7} {'p':>8} {'n':>10}"]
    for finding in findings:
        z = "" if finding.z is None else f"{finding.z:.2f}"
        figures = f"{finding.value:>12.6g} {finding.expected:>12.6g} {z:>7} {finding.p:>8.4f} {finding.n:>10}"
        lines.append(f"{finding.test:<36} {figures}")
    least = min(finding.p for finding in findings)
    by_chance = 1 - (1 - least) ** len(findings)
    lines.append(f"smallest p {least:.4f}; true normals show one as small in {by_chance:.0%} of such studies")
    return "\n".join(lines)


def _draw(shape: Shape, step: int = 0, stream: int = 0, seed: int = SEED) -> NDArray[np.float64]:
    return ops.randn(shape, seed=seed, step=step, stream=stream, backend="cpu").double().numpy().reshape(shape[0], -1)


def _moments(x: NDArray[np.float64]) -> Iterator[Finding]:
    # The standard errors are those of n true normals of known mean 0 and variance 1.
    for name, power, expected, variance in (
        ("mean", 1, 0, 1),
        ("variance", 2, 1, 2),
        ("third moment", 3, 0, 15),
        ("fourth moment", 4, 3, 96),
    ):
        yield _finding(name, float((x**power).mean()), expected, variance, x.size)
    centred = x - x.mean()
    deviation = math.sqrt((centred**2).mean())
    yield _finding("skewness", float((centred**3).mean() / deviation**3), 0, 6, x.size)
    yield _finding("excess kurtosis", float((centred**4).mean() / deviation**4 - 3), 0, 24, x.size)


def _tails(x: NDArray[np.float64]) -> Iterator[Finding]:
    for threshold in TAILS:
        share = math.erfc(threshold / math.sqrt(2))
        measured = float((np.abs(x) > threshold).mean())
        yield _finding(f"share beyond {threshold:g}", measured, share, share * (1 - share), x.size)


def _correlations(x: NDArray[np.float64], shape: Shape) -> Iterator[Finding]:
    for lag in (1, 2, 3, 4):
        yield _correlation(f"neighbours, lag {lag}", x[:, :-lag], x[:, lag:])
    # The two normals of one Box-Muller pair share their radius, which products of the values would not show.
    yield _correlation("squares, lag 1", (x[:, :-1] ** 2 - 1) / math.sqrt(2), (x[:, 1:] ** 2 - 1) / math.sqrt(2))
    yield _correlation("neighbouring places", x[:-1], x[1:])
    yield _correlation("neighbouring seeds", x, _draw(shape, seed=SEED + 1))
    yield _correlation("neighbouring steps", x, _draw(shape, step=1))
    yield _correlation("neighbouring streams", x, _draw(shape, stream=1))
    yield _correlation("step noise, neighbouring steps", _draw(shape, step=7, stream=1), _draw(shape, step=8, stream=1))


def _correlation(name: str, a: NDArray[np.float64], b: NDArray[np.float64]) -> Finding:
    return _finding(f"correlation: {name}", float((a * b).mean()), 0, 1, a.size)


def _finding(name: str, value: float, expected: float, variance: float, n: int) -> Finding:
    z = (value - expected) / math.sqrt(variance / n)
    return Finding(name, value, expected, z, math.erfc(abs(z) / math.sqrt(2)), n)
