"""What every sampler is: a table and the loop around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastsample.model import Model, unwrapped
from fastsample.samplers.hints import no_argument, warn_of_amplified_errors
from fastsample.samplers.loop import CorrectX0, Loop
from fastsample.samplers.run import Options, Step
from fastsample.samplers.start import last_rows
from fastsample.schedule import checked_schedule
from fastsample.tables import Table
from fastsample.timesteps import Int64Array, Timesteps, one_step_from_the_noisiest

_OPTIONS = frozenset(Options.__annotations__)


class Sampler:
    """A table and the loop around it: what every sampler inherits, and how a table of your own is sampled.

    Immutable, so one sampler serves any number of models and threads at once.

    Attributes:
        table: the coefficients, a row per model call.

    Example:
        >>> table = Table([999, 0], p=[2.0, 1.0], q=[-1.7, 0.0], b=[0.9, 1.0], d=[0.4, 0.0])
        >>> Sampler(table)(lambda x, t: 0.1 * x, (1, 3)).shape
        torch.Size([1, 3])
    """

    table: Table
    correct_x0: CorrectX0 | None = None

    def __init__(self, table: Table) -> None:
        if not isinstance(table, Table):
            raise TypeError(f"table must be a fastsample.Table, got {type(table).__name__}")
        self._set(table=table)

    def __call__(self, model: Model, x: Tensor | Sequence[int], **options: Unpack[Options]) -> Any:
        """Samples from the model.

        Args:
            model, x: see fastsample.ddim.
            **options: see fastsample.Options.
        """
        given: dict[str, Any] = dict(options)
        callback, progress = given.pop("callback", None), given.pop("progress", False)
        decode, out = given.pop("decode", None), given.pop("out", None)
        for name, function in (("callback", callback), ("decode", decode)):
            if not (function is None or callable(function)):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        loop = self._loop(model, x, given)
        if out is not None:
            loop.check_out(out)
        bar = _progress_bar(len(loop.schedule)) if progress else nullcontext()
        with torch.set_grad_enabled(loop.differentiable), bar as shown:
            for step in loop.rows(observed=callback is not None):
                if callback is not None and step is not None:
                    callback(step)
                if shown is not None:
                    shown.update()
            result = loop.result()
            if out is not None:
                result = out.copy_(result)
            return result if decode is None else unwrapped(decode(result))

    def iterate(self, model: Model, x: Tensor | Sequence[int], **options: Unpack[Options]) -> Iterator[Step]:
        """The same loop as a generator: yields a Step after each row; the last one's `x` is the sample.

        Takes what a call takes but callback, progress, decode and out. Arguments are checked at the call, not at the
        first step. `step.x` and `step.x0` are the loop's buffers: clone what you keep, as in
        `previews = [step.x0.clone() for step in sampler.iterate(...)]`. Between steps the caller's own gradient mode is
        in force.
        """
        return _outside_grad_mode(self._loop(model, x, dict(options)))

    def table_from(self, row: int) -> Table:
        """The table of a run that starts at this row, of the same length.

        Raises:
            ValueError: where the row, or the one after it, reads an x0 from before it.
        """
        table = self.table
        if table.c1[row] != 0 or table.c2[row : row + 2].any():
            raise ValueError(f"{type(self).__name__} cannot start at row {row}, which needs the x0 of earlier rows")
        return table

    def _part(self, strength: float) -> tuple[Table, int]:
        """(the table, its first row) of a run from a clean sample, as diffusers' image-to-image pipelines have it."""
        return last_rows(self, strength)

    def _own_options(self, model: Model, x: Tensor | Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
        """These options with what this sampler alone takes expressed in what all take."""
        return options

    def _loop(self, model: Model, x: Tensor | Sequence[int], options: dict[str, Any]) -> Loop:
        return self._loop_of(model, x, self._own_options(model, x, options))

    def _loop_of(self, model: Model, x: Tensor | Sequence[int], options: dict[str, Any]) -> Loop:
        """A run with options that all samplers take."""
        if unknown := sorted(set(options) - _OPTIONS):
            raise TypeError(no_argument(type(self).__name__, unknown[0], vars(self)))
        if misplaced := sorted({"callback", "progress", "decode", "out"} & set(options)):
            raise TypeError(f"iterate takes no {', '.join(misplaced)}: do that between the steps it yields")
        return Loop(self, model, x, **options)

    def _set(self, **attributes: object) -> None:
        # Samplers are frozen dataclasses: what __post_init__ works out goes past the lock.
        self.__dict__.update(attributes)
        if "table" in attributes:
            warn_of_amplified_errors(self.table)

    def _spaced(self: Any, spacing: Callable[[int, Timesteps, int | None], Int64Array]) -> Int64Array:
        """The timesteps that `timesteps` and `steps` name; both are replaced by what they came to."""
        T = checked_schedule(self.schedule).T
        t = one_step_from_the_noisiest(T, self.timesteps, spacing(T, self.timesteps, self.steps))
        if not isinstance(self.timesteps, str):
            self._set(timesteps=tuple(t.tolist()))
        self._set(steps=len(t))
        return t


def _progress_bar(total: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total)


def _outside_grad_mode(loop: Loop) -> Iterator[Step]:
    rows = loop.rows(observed=True)
    while True:
        with torch.set_grad_enabled(loop.differentiable):
            step = next(rows, None)
        if step is None:
            return
        yield step
