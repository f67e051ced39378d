"""A model whose output is used again where its input moved little: EasyCache (Zhou et al. 2025) at the output."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.checks import real
from fastsample.model import Model, unwrapped
from fastsample.tables import Table

LEAST_CALLS = 12
_FIRST, _LAST = 0.15, 0.95  # of the rows: those between may be skipped


def cached(model: Model, threshold: float = 0.1) -> Cached:
    """The model, of which long runs call only some rows: where its output would have changed little, it is used again.

    From two calls it is known how much the output moves with the input, k = |m - m'| / |x - x'|, means of absolute
    values. From then on k |x - x'| / |m| of every row is summed up; while the sum is below the threshold the last
    output is taken, and the next call sets it to 0. All of this is known of each sample alone, so that samples do not
    depend on their batch; the model is called unless all samples of the batch can do without. The first 15 % and the
    last 5 % of the rows are always called.

    Args:
        model: as samplers take it. Whatever samplers ask of it (schedule, prediction, ...) is the model's own.
        threshold: how much the output may have changed, relative to its size. 0 skips nothing.

    Returns:
        What samplers take in the model's place; `.to()` and `.eval()` of it give the model itself. A run of fewer than
        12 model calls, Heun's, a Batcher, a graph and transforms refuse it: in few steps nothing can be left out. On a
        GPU the host waits for every row.

    Raises:
        ValueError, TypeError: a threshold that is negative or no number, or a model that cannot be called.

    Example:
        >>> import fastsample
        >>> calls = []
        >>> def model(x, t):
        ...     calls.append(int(t[0]))
        ...     return 0.1 * x
        >>> x = fastsample.ddim(cached(model, 0.2), (2, 3, 8, 8), steps=50, seed=0)
        >>> len(calls) < 40
        True
    """
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t, **model_kwargs), got {type(model).__name__}")
    if isinstance(model, Cached):
        raise TypeError("model is a cached one already")
    if not 0 <= real("threshold", threshold) < np.inf:
        raise ValueError(f"threshold must not be negative, got {threshold}")
    return Cached(model, float(threshold))


class Cached:
    """A model and a threshold: what `cached` returns. Every run keeps a memory of its own."""

    def __init__(self, model: Model, threshold: float) -> None:
        self.model, self.threshold = model, threshold

    def __call__(self, x: Tensor, t: Tensor, **keywords: Any) -> Any:
        """The model itself."""
        return self.model(x, t, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name == "model" or name.startswith("__"):  # of a copy that has none yet; how to copy is our own
            raise AttributeError(name)
        return getattr(self.model, name)

    def of_run(self, table: Table, first_row: int) -> CachedRun:
        """The model of one run of these rows.

        Raises:
            ValueError: they are too few, or two of them make a step.
        """
        rows = len(table) - first_row
        if rows < LEAST_CALLS:
            raise ValueError(f"a cached model is for runs of at least {LEAST_CALLS} model calls, this one has {rows}")
        if table.alpha is not None and table.sigma is not None:
            # A corrector's row stays at the level of its predictor's; the last row may do so too.
            stays = (np.diff(table.alpha[1:-1]) == 0) & (np.diff(table.sigma[1:-1]) == 0)
            if stays.any():
                raise ValueError("a cached model cannot serve two model calls a step, as in Heun's method")
        return CachedRun(self.model, self.threshold, rows)


class CachedRun:
    """The model of a run of so many rows, with what it remembers of each sample.

    That is the input of the last row and of the last call, and how much the output may have changed since.
    """

    _x: Tensor
    _called: Tensor
    _change: Tensor

    def __init__(self, model: Model, threshold: float, rows: int) -> None:
        self._model, self._threshold = model, threshold
        self._skippable = range(int(np.ceil(_FIRST * rows)), int(_LAST * rows))
        self.begin()

    def begin(self) -> None:
        """Forgets everything: before the first row of every run."""
        self._row = 0
        self._output: Tensor | None = None
        self._rate: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        """The model's output, or the last one."""
        row, self._row = self._row, self._row + 1
        seen = x.detach().to(torch.float32, copy=True)  # the loop steps over x
        skipped = self._skipped(seen) if row in self._skippable else None
        if skipped is not None and bool(skipped.all()):
            assert self._output is not None
            return self._output
        output = unwrapped(self._model(x, t, **keywords))
        return self._remember(seen, output, skipped)

    def _skipped(self, x: Tensor) -> Tensor | None:
        """Of which samples the output may be used again."""
        if self._rate is None or self._x.shape != x.shape:
            return None
        self._change = self._change + self._rate * _mean(x - self._x)
        self._x = x
        return self._change < self._threshold

    def _remember(self, x: Tensor, output: Tensor, skipped: Tensor | None) -> Tensor:
        before, seen = self._output, output.detach().float()
        if before is None or before.shape != output.shape:
            self._rate = None
        else:
            moved = _mean(x - self._called)
            rate = torch.where(moved > 0, _mean(seen - before.detach().float()) / moved / _mean(seen), torch.inf)
            if skipped is None:
                self._rate = rate
            else:
                assert self._rate is not None
                self._rate = torch.where(skipped, self._rate, rate)
                output = torch.where(per_sample(skipped, output), before, output)
        kept = output.clone()  # a model may have one buffer for all its outputs
        called = x if skipped is None else torch.where(per_sample(skipped, x), self._called, x)
        change = torch.zeros(len(x), device=x.device)
        self._change = change if skipped is None else torch.where(skipped, self._change, change)
        self._x, self._called, self._output = x, called, kept
        return output


def _mean(values: Tensor) -> Tensor:
    """Of each sample's absolute values."""
    return values.abs().reshape(len(values), -1).mean(1)
