"""Every mode of a step, one list for CPU, CUDA and Triton."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastsample import Table
from support.formula import normal

# Of the model.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# p and q are those of a model of epsilon at the level (0.8, 0.6).
BASE = dict(p=1.25, q=-0.75, a=0.2, b=0.9, d=0.3)
HISTORY = dict(c1=[0.0, 0.4, 0.4, 0.4], c2=[0.0, 0.0, -0.3, -0.3])
THREE = {**HISTORY, "c3": [0.0, 0.0, 0.0, 0.25]}
LEARNED = dict(s=0.5, g0=-0.4, g1=0.7)
# Entries: epsilon, which is m where x0 is not limited, and what is nothing in particular.
EPSILON = dict(hx=1 / 0.6, h0=-0.8 / 0.6)
ENTRY = dict(hx=0.4, h0=-0.6)


def _of(letters: str, **more: float) -> dict[str, float]:
    return {**{name: BASE[name] for name in letters}, **more}


# Kinds of row, by which coefficients are 0. What is called folded needs no x0 of its own.
KINDS: dict[str, dict[str, float]] = {
    "nothing": {},
    "x-only": _of("a"),
    "m-only": _of("d"),
    "x0-only": dict(q=1.0, b=1.0),
    "folded": _of("pqbd"),
    "folded-noise": _of("pqbd", s=0.5),
    "clamped": _of("pqab", limit=0.8),
    "clamped-keeps-epsilon": _of("pqbd", limit=0.8),
    "clamped-all": _of("pqabd", limit=0.8),
    "clamped-x0-of-m": _of("qab", limit=0.8),
    "clamped-x0-of-x": _of("pb", limit=0.8),
    "clamped-x0-unused": _of("pqa", limit=0.8),
    "clamped-noise": _of("pqab", s=0.5, limit=0.8),
    "all-terms": _of("pqabd", s=0.5, limit=0.8),
    "learned": _of("pqb", **LEARNED),
    "learned-far": _of("pqab", s=0.5, g1=40.0, limit=0.8),
    "one-history": _of("pqab", c1=-0.3),
    "two-histories": _of("pqab", c1=-0.3, c2=0.2),
    "three-histories": _of("pqab", c1=-0.3, c2=0.2, c3=-0.1),
    "third-history-alone": _of("pqab", c3=-0.1, limit=0.8),
    "epsilon-entry": _of("pqabd", **EPSILON),
    "other-entry": _of("pqabd", **ENTRY),
    "clamped-epsilon-entry": _of("pqab", limit=0.8, **EPSILON),
    "clamped-entry-of-x": _of("qb", limit=0.8, hx=0.4, h0=0.0),
    "clamped-entry-of-x0": _of("pqab", limit=0.8, h0=-0.6),
    "three-epsilons-clamped": _of("pqabd", c1=-0.3, c2=0.2, c3=-0.1, limit=0.8, **EPSILON),
    "everything": _of("pqabd", c1=-0.3, c2=0.2, c3=-0.1, s=0.5, g1=0.4, limit=0.8, **ENTRY),
    "thresholded": _of("pqab", limit=2.5, quantile=0.9),
    "thresholded-epsilon-entry": _of("pqab", limit=2.5, quantile=0.9, **EPSILON),
}
# Those of them without a history, a learned variance or a threshold that a test holds to every size and dtype.
PLAIN_KINDS = (
    *("folded", "folded-noise", "clamped", "clamped-keeps-epsilon", "all-terms", "x0-only"),
    *("epsilon-entry", "other-entry", "clamped-epsilon-entry", "clamped-entry-of-x", "clamped-entry-of-x0"),
)

TIMES = [40, 30, 20, 10]
LAST = 3  # the row of a mode that is called: it alone may read three earlier ones
# What the row holds, whether the output has a variance half, the guidance ("each": one weight per sample) and phi.
MODES: dict[str, tuple[dict[str, Any], bool, object, float]] = {
    "history": ({**BASE, **HISTORY}, False, None, 0.0),
    "history-clamped": ({**BASE, **HISTORY, "limit": 0.8}, False, None, 0.0),
    "history-noise": ({**BASE, **HISTORY, "s": 0.5, "limit": 0.8}, False, None, 0.0),
    "history-of-three": ({**BASE, **THREE}, False, None, 0.0),
    "history-of-epsilon": ({**BASE, **THREE, **EPSILON}, False, None, 0.0),
    "history-of-epsilon-clamped": ({**BASE, **THREE, **EPSILON, "limit": 0.8}, False, None, 0.0),
    "history-of-entries": ({**BASE, **THREE, **ENTRY, "s": 0.5}, False, None, 0.0),
    "history-of-entries-thresholded": ({**BASE, **THREE, **ENTRY, "quantile": 0.9, "limit": 2.0}, False, None, 0.0),
    "history-of-entries-rescaled": ({**BASE, **THREE, **ENTRY}, False, 7.5, 0.7),
    "folded-far": (dict(p=500.0, q=-499.0, a=0.5, b=0.001, d=0.4), False, None, 0.0),
    "learned": ({**BASE, **LEARNED}, True, None, 0.0),
    "learned-clamped": ({**BASE, **LEARNED, "limit": 0.8}, True, None, 0.0),
    "guided": (BASE, False, 7.5, 0.0),
    "guided-each": ({**BASE, "limit": 0.8}, False, "each", 0.0),
    "guided-learned": ({**BASE, **LEARNED}, True, 3.0, 0.0),
    "rescaled": (BASE, False, 7.5, 0.7),
    "rescaled-each-learned": ({**BASE, **LEARNED, "limit": 0.8}, True, "each", 1.0),
    "thresholded": ({**BASE, "quantile": 0.9}, False, None, 0.0),
    "thresholded-max": ({**BASE, "quantile": 0.9, "limit": 1.5}, False, None, 0.0),
    "thresholded-rescaled": ({**BASE, "quantile": 0.9}, False, 7.5, 0.7),
    "everything": (
        {**BASE, **THREE, **ENTRY, **LEARNED, "quantile": 0.9, "limit": 2.0, "e": [2.0, 1.0, 0.5, 0.25]},
        True,
        "each",
        0.5,
    ),
}


def case(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Table, dict[str, Any]]:
    """The table of the mode and the tensors of a call of its last row; samples alone are rows of them."""
    columns, learned, guidance, phi = MODES[name]
    output = (shape[0], 2 * shape[1], *shape[2:]) if learned else shape
    m = normal(output, 2, dtype)
    call: dict[str, Any] = {"x": normal(shape, 1), "model_output": m, "guidance": None}
    call["history"] = tuple(normal(shape, seed) for c, seed in (("c1", 4), ("c2", 5), ("c3", 7)) if c in columns)
    if guidance is not None:
        call["model_output"] = torch.cat([normal(output, 3, dtype), m])
        # 1 is the conditional output itself; a negative weight is unusual and allowed.
        call["guidance"] = [1.0, 7.5, -0.5][: shape[0]] if guidance == "each" else guidance
    call["guidance_rescale"] = phi
    return Table(TIMES, **columns), call


def alone(call: dict[str, Any], i: int) -> dict[str, Any]:
    """The same call for sample i only."""
    batch, weights = len(call["x"]), call["guidance"]
    return {
        **call,
        "x": call["x"][i : i + 1],
        "model_output": call["model_output"][i::batch],
        "history": tuple(h[i : i + 1] for h in call["history"]),
        "guidance": [weights[i]] if isinstance(weights, list) else weights,
    }


# A row of another mode for each sample.
MIXED = Table(
    [40, 30, 20, 10, 0],
    p=[1.2, 0.5, 2.0, 0.0, 1.0],
    q=[-0.7, 0.3, -1.0, 1.0, 0.5],
    a=[0.2, 0.0, 0.4, 0.0, -0.3],
    b=[0.9, 1.0, 0.0, 0.8, 0.7],
    c1=[0.0, 0.3, 0.0, 0.2, 0.0],
    c2=[0.0, 0.0, -0.4, 0.1, 0.0],
    c3=[0.0, 0.0, 0.0, -0.3, 0.2],
    d=[0.3, 0.0, -0.5, 0.0, 0.1],
    s=[0.5, 0.0, 0.4, 0.3, 0.0],
    g0=[-0.1, 0.0, 0.2, 0.0, 0.0],
    g1=[0.6, 0.0, 0.0, -0.4, 0.0],
    limit=[math.inf, 0.8, math.inf, 3.0, math.inf],
    quantile=[0.9, 0.0, 0.0, 0.5, 0.0],
    hx=[0.5, 0.0, 0.3, -0.4, 0.0],
    h0=[-0.8, 1.0, 0.5, 0.0, 1.0],
    e=[1.0, 0.5, 1.0, 2.0, 0.25],
)
