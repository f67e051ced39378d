"""Classifier-free guidance (Ho & Salimans 2022): one model call for both halves, combined inside the step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample.loop.guidance_methods import Bending, Guidance, checked_interval
from fastsample.loop.options import RunOptions
from fastsample.ops.checks import check_finite_guidance, check_rescale, guidance_weights


@dataclass(frozen=True, eq=False)
class Shared:
    """A value among the model's keywords that all samples share: the model is given the value itself.

    Under guidance one model call serves both halves of a batch, so tensors and lists among its keywords are taken to
    have an entry per sample, and are doubled. What is wrapped in this is not.

    Attributes:
        value: anything; floating-point tensors in it are cast like all keywords (see fastsample.Options).

    Example:
        >>> import fastsample
        >>> def model(x, t, c, table):
        ...     assert len(c) == len(x) and table.shape == (7,)
        ...     return 0.1 * x
        >>> table = fastsample.Shared(torch.arange(7.0))
        >>> cond, uncond = {"c": torch.ones(2, 1)}, {"c": torch.zeros(2, 1)}
        >>> fastsample.ddim(
        ...     model, (2, 3), steps=2, guidance=2.0, cond=cond, uncond=uncond, model_kwargs={"table": table}
        ... ).shape
        torch.Size([2, 3])
    """

    value: Any


@dataclass(frozen=True)
class GuidedRows:
    """Which rows of a run are guided, how strongly, and the keywords of their model calls.

    Attributes:
        weights: w, one per sample; None where no row is guided.
        rescale: phi of guidance rescale.
        interval: the times, inclusive, between which rows are guided; None for all.
        conditional: the model's keywords where only the conditional half is evaluated.
        both: those of a batch [unconditional, conditional].
        bending: what combines both halves, where the step does not.
        one_weight: whether w was given as a number, the same for all samples.
        interval_name: what messages call the interval.
    """

    weights: Tensor | None
    rescale: float
    interval: tuple[float, float] | None
    conditional: Mapping[str, Any]
    both: Mapping[str, Any]
    bending: Bending | None = None
    one_weight: bool = False
    interval_name: str = "guidance_interval"

    def at(self, t: float) -> bool:
        """Whether a row whose model time is t is guided."""
        if self.weights is None:
            return False
        return self.interval is None or self.interval[0] <= t <= self.interval[1]


UNGUIDED = GuidedRows(None, 0.0, None, {}, {})


def guidance_of(
    like: Tensor, options: RunOptions, known_dtype: torch.dtype | None, *, backend: str | None = None
) -> GuidedRows:
    """The guidance that these options of a run ask for.

    Args:
        like: a tensor with as many entries as there are samples, on the device and in the dtype of the weights.
        options: those of the run, of which this reads the model's keywords and all that begins with `guidance`.
        known_dtype: what the model is known to want, which floating-point tensors among the keywords are cast to; None
            leaves them as they are, and so does `cast_kwargs=False`.
        backend: what runs methods other than the plain one; None where they cannot be served.

    Raises:
        ValueError, TypeError: for a weight that is not finite, an interval the wrong way round, a missing `uncond`,
            what means nothing without guidance, and keywords that cannot be batched.
    """
    dtype = known_dtype if options.cast_kwargs else None
    of_object = isinstance(options.guidance, Guidance)
    options, method = _spelt_out(options, bends=backend is not None)
    uncond, rescale, interval = options.uncond, options.guidance_rescale, options.guidance_interval
    for name in ("model_kwargs", "cond", "uncond"):
        keywords = getattr(options, name)
        if not isinstance(keywords, Mapping | None):
            raise TypeError(f"{name} must be a mapping of keywords, got {type(keywords).__name__}")
    check_rescale(rescale, guided=True)
    common = dict(options.model_kwargs or {})
    cond = {**common, **(options.cond or {})}
    conditional = _mapped(cond, dtype)
    if options.guidance is None:
        idle = {"uncond": uncond or None, "guidance_interval": interval, "guidance_rescale": rescale or None}
        if useless := [name for name, value in idle.items() if value is not None]:
            raise ValueError(f"{' and '.join(useless)} without guidance=, the weight")
        return GuidedRows(None, 0.0, None, conditional, {})
    interval = None if interval is None else checked_interval("guidance_interval", interval)
    assert not isinstance(options.guidance, Guidance)
    name = "guidance.weight" if of_object else "guidance"
    weights = guidance_weights(options.guidance, like, name)
    if _is_one(options.guidance, weights, name):
        return GuidedRows(None, rescale, interval, conditional, {})
    if uncond is None:
        raise ValueError("guidance needs uncond=: the model's keywords for the unconditional half")
    both = _batched({**common, **uncond}, cond, len(like), "")
    one_weight = isinstance(options.guidance, int | float)
    bending = None if method is None or backend is None else Bending(method, weights, backend)
    rescale = rescale if bending is None else 0.0  # which the method does itself
    interval_name = "guidance.interval" if of_object else "guidance_interval"
    return GuidedRows(weights, rescale, interval, conditional, _mapped(both, dtype), bending, one_weight, interval_name)


def _spelt_out(options: RunOptions, *, bends: bool) -> tuple[RunOptions, Guidance | None]:
    """The options with a Guidance in terms of the others, and itself where its method is not the plain one."""
    guidance = options.guidance
    if not isinstance(guidance, Guidance):
        return options, None
    given = {
        "guidance_rescale": options.guidance_rescale != 0,
        "guidance_interval": options.guidance_interval is not None,
    }
    if twice := [name for name, value in given.items() if value]:
        raise ValueError(f"{' and '.join(twice)} beside a fastsample.Guidance, which has its own")
    method = None if guidance.method == "plain" else guidance
    if method is not None and not bends:
        raise ValueError(
            f"guidance of method {guidance.method!r} is for whole runs of one sampler: here it must be plain"
        )
    spelt = options._replace(
        guidance=guidance.weight, guidance_rescale=guidance.rescale, guidance_interval=guidance.interval
    )
    return spelt, method


def _is_one(guidance: float | Sequence[float] | Tensor, weights: Tensor, name: str) -> bool:
    """Whether every weight is 1; raises where one is not finite."""
    if isinstance(guidance, int | float):
        return guidance == 1  # reading it back from a GPU would wait for all work before it
    read = weights.cpu()
    check_finite_guidance(read, guidance, name)
    return bool((read == 1).all())


def _batched(uncond: Mapping[str, Any], cond: Mapping[str, Any], batch: int, path: str) -> dict[str, Any]:
    if set(uncond) != set(cond):
        alone = ", ".join(sorted(path + name for name in set(uncond) ^ set(cond)))
        raise ValueError(f"cond and uncond must give the model the same keywords; only one of them has {alone}")
    return {name: _joined(uncond[name], cond[name], batch, path + name) for name in cond}


def _joined(uncond: Any, cond: Any, batch: int, name: str) -> Any:
    """What serves both halves, by the types of the values alone."""
    if isinstance(cond, Mapping) and isinstance(uncond, Mapping):
        return rebuilt(cond, _batched(uncond, cond, batch, f"{name}."))
    if isinstance(cond, list) and isinstance(uncond, list):
        if not len(cond) == len(uncond) == batch:
            raise ValueError(
                f"{name} is a list, so one entry per sample: {batch} in cond and in uncond, got {len(cond)} and "
                f"{len(uncond)}. A tuple is gone through entry by entry instead, fastsample.Shared(...) goes to both "
                "halves as it is"
            )
        return [*uncond, *cond]
    if isinstance(cond, tuple) and isinstance(uncond, tuple) and len(cond) == len(uncond):
        joined = (_joined(u, c, batch, f"{name}[{i}]") for i, (u, c) in enumerate(zip(uncond, cond, strict=True)))
        return type(cond)(*joined) if hasattr(cond, "_fields") else type(cond)(joined)
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor) and (cond.ndim or uncond.ndim):
        return _joined_tensors(uncond, cond, batch, name)
    if not _same(uncond, cond):
        raise ValueError(
            f"{name} differs between cond and uncond and is neither a tensor nor a list with an entry per sample: one "
            "model call cannot serve both"
        )
    return cond


def _joined_tensors(uncond: Tensor, cond: Tensor, batch: int, name: str) -> Tensor:
    if not (cond.ndim and uncond.ndim and len(cond) == len(uncond) == batch):
        raise ValueError(
            f"{name} is a tensor, so its first axis counts the samples: {batch} in cond and in uncond, got shapes "
            f"{tuple(cond.shape)} and {tuple(uncond.shape)}. Expand it to that, or wrap what all samples share: "
            "fastsample.Shared(tensor)"
        )
    if cond.shape[1:] != uncond.shape[1:]:
        raise ValueError(
            f"{name} must have one shape in cond and uncond (pad the shorter), got {tuple(cond.shape)} and "
            f"{tuple(uncond.shape)}"
        )
    return torch.cat([uncond, cond])


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Shared) and isinstance(other, Shared):
        return _same(one.value, other.value)
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.device == other.device and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    try:
        return bool(np.all(one == other))
    except (RuntimeError, ValueError, TypeError):  # of objects that hold tensors
        return False


def _as_given(value: Any, dtype: torch.dtype | None) -> Any:
    """What the model is given for a keyword: out of its Shared, floating-point tensors in this dtype if it is one."""
    if isinstance(value, Shared):
        return _as_given(value.value, dtype)
    if isinstance(value, Tensor):
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value
    if isinstance(value, Mapping):
        return _mapped(value, dtype)
    if type(value) is list or isinstance(value, tuple):
        entries = [_as_given(one, dtype) for one in value]
        if all(entry is one for entry, one in zip(entries, value, strict=True)):
            return value
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def rebuilt(mapping: Mapping[str, Any], entries: dict[str, Any]) -> Mapping[str, Any]:
    """A mapping of the same type, such as a transformers.ModelOutput, that holds these entries for its own.

    It is a copy that is written to: constructors of such types take anything.
    """
    if type(mapping) is dict or not isinstance(mapping, MutableMapping):
        return entries
    result = copy.copy(mapping)
    for name, value in entries.items():
        result[name] = value
    return result


def _mapped(keywords: Mapping[str, Any], dtype: torch.dtype | None) -> Mapping[str, Any]:
    entries = {name: _as_given(value, dtype) for name, value in keywords.items()}
    if all(entries[name] is value for name, value in keywords.items()):
        return keywords
    return rebuilt(keywords, entries)
