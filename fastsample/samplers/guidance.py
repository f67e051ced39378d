"""Classifier-free guidance (Ho & Salimans 2022): one model call for both halves, combined inside the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample.ops.checks import guidance_weights


@dataclass(frozen=True)
class Guidance:
    """Which rows are guided, how strongly, and the keywords of their model calls.

    Attributes:
        weights: w, one per sample; None where no row is guided.
        rescale: phi of guidance rescale.
        interval: the times, inclusive, between which rows are guided; None for all.
        conditional: the model's keywords where only the conditional half is evaluated.
        both: those of a batch [unconditional, conditional].
    """

    weights: Tensor | None
    rescale: float
    interval: tuple[float, float] | None
    conditional: Mapping[str, Any]
    both: Mapping[str, Any]

    def at(self, t: float) -> bool:
        """Whether a row whose model time is t is guided."""
        if self.weights is None:
            return False
        return self.interval is None or self.interval[0] <= t <= self.interval[1]


UNGUIDED = Guidance(None, 0.0, None, {}, {})


def guidance_of(
    state: Tensor,
    guidance: float | Sequence[float] | Tensor | None,
    rescale: float,
    interval: tuple[float, float] | None,
    model_kwargs: Mapping[str, Any] | None,
    cond: Mapping[str, Any] | None,
    uncond: Mapping[str, Any] | None,
) -> Guidance:
    """The guidance that these arguments of a run ask for.

    Raises:
        ValueError, TypeError: for a weight that is not finite, an interval the wrong way round, a missing `uncond`,
            what means nothing without guidance, and keywords that cannot be batched.
    """
    if guidance is None and model_kwargs is cond is uncond is interval is None and rescale == 0:
        return UNGUIDED
    for name, given in (("model_kwargs", model_kwargs), ("cond", cond), ("uncond", uncond)):
        if not isinstance(given, Mapping | None):
            raise TypeError(f"{name} must be a mapping of keywords, got {type(given).__name__}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must lie in [0, 1], got {rescale}")
    common = dict(model_kwargs or {})
    conditional = {**common, **(cond or {})}
    if guidance is None:
        idle = {"uncond": uncond or None, "guidance_interval": interval, "guidance_rescale": rescale or None}
        if useless := [name for name, value in idle.items() if value is not None]:
            raise ValueError(f"{' and '.join(useless)} without guidance=, the weight")
        return Guidance(None, 0.0, None, conditional, {})
    interval = None if interval is None else _checked_interval(interval)
    weights = guidance_weights(guidance, state)
    if _is_one(guidance, weights):
        return Guidance(None, rescale, interval, conditional, {})
    if uncond is None:
        raise ValueError("guidance needs uncond=: the model's keywords for the unconditional half")
    both = _batched({**common, **uncond}, conditional, len(state), "")
    return Guidance(weights, rescale, interval, conditional, both)


def _is_one(guidance: float | Sequence[float] | Tensor, weights: Tensor) -> bool:
    """Whether every weight is 1; raises where one is not finite."""
    if isinstance(guidance, int | float):
        return guidance == 1  # reading it back from a GPU would wait for all work before it
    read = weights.cpu()
    if not read.isfinite().all():
        raise ValueError(f"guidance must be finite, got {guidance}")
    return bool((read == 1).all())


def _checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError):
        raise TypeError(f"guidance_interval must be (t_lo, t_hi), got {interval!r}") from None
    if not low <= high:
        raise ValueError(f"guidance_interval must be (t_lo, t_hi) with t_lo <= t_hi, got {interval}")
    return low, high


def _batched(uncond: Mapping[str, Any], cond: Mapping[str, Any], batch: int, path: str) -> dict[str, Any]:
    if set(uncond) != set(cond):
        alone = ", ".join(sorted(path + name for name in set(uncond) ^ set(cond)))
        raise ValueError(f"cond and uncond must give the model the same keywords; only one of them has {alone}")
    return {name: _joined(uncond[name], cond[name], batch, path + name) for name in cond}


def _joined(uncond: Any, cond: Any, batch: int, name: str) -> Any:
    if isinstance(cond, Mapping) and isinstance(uncond, Mapping):
        return _batched(uncond, cond, batch, f"{name}.")
    if isinstance(cond, list | tuple) and isinstance(uncond, list | tuple) and len(cond) == len(uncond):
        joined = (_joined(u, c, batch, f"{name}[{i}]") for i, (u, c) in enumerate(zip(uncond, cond, strict=True)))
        return type(cond)(*joined) if hasattr(cond, "_fields") else type(cond)(joined)
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        if cond.ndim and uncond.ndim and len(cond) == len(uncond) == batch:
            if cond.shape[1:] != uncond.shape[1:]:
                raise ValueError(
                    f"{name} must have one shape in cond and uncond (pad the shorter), got {tuple(cond.shape)} and "
                    f"{tuple(uncond.shape)}"
                )
            return torch.cat([uncond, cond])
        same = torch.equal(cond, uncond) if cond.shape == uncond.shape else False
    else:
        same = cond is uncond or (type(cond) is type(uncond) and bool(np.all(cond == uncond)))
    if not same:
        raise ValueError(
            f"{name} differs between cond and uncond and is no tensor whose first axis is the batch of {batch} (expand "
            "it to that): one model call cannot serve both"
        )
    return cond
