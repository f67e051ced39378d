"""What every sampler is: a table and the loop around it.

`options_of` and `loop_of` are for whoever runs a sampler otherwise than by calling it, as fastsample.graph does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from fastsample.caller import warn
from fastsample.hints import check_takes, of_diffusers
from fastsample.loop.compiled import compiled_run
from fastsample.loop.copies import copied
from fastsample.loop.drive import drive, hooks_of, shown
from fastsample.loop.loop import Loop
from fastsample.loop.options import CorrectX0, Decode, Decoded, Options, RunOptions, Step, Undecoded
from fastsample.loop.prepared import COPIED, Prepared
from fastsample.model import Model, unwrapped
from fastsample.samplers.hints import NoScheduler, no_option, warn_of_amplified_errors
from fastsample.samplers.limits import hashable
from fastsample.samplers.start import checked_start_step, checked_strength, steps_left_out
from fastsample.tables import Table

_FLAGS = frozenset({"rederive_epsilon", "lower_order_final", "sde", "corrector"})  # those that samplers have


class Sampler(NoScheduler):
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
    quiet = False  # whether its construction never warns
    _warns = False  # whether it did
    _low_start: str | None = None  # what is told of a run from drawn noise
    _amplifies_x0: ClassVar[bool] = False  # whether its rows multiply errors in x0 too next to pure noise

    def __init__(self, table: Table) -> None:
        if not isinstance(table, Table):
            raise TypeError(f"table must be a fastsample.Table, got {type(table).__name__}{of_diffusers(table)}")
        self._set(table=table)

    def __call__(
        self,
        model: Model,
        x: Tensor | Sequence[int],
        *,
        decode: Decode[Decoded] | None = None,
        **options: Unpack[Undecoded],
    ) -> Decoded:
        """Samples from the model.

        Args:
            model, x: see fastsample.ddim.
            decode: what to make of the sample before it is returned, see fastsample.Options.
            **options: see fastsample.Options.
        """
        if torch.compiler.is_compiling():
            asked = options_of(self, model, x, options)
            sample: Any = compiled_run(self.table, self.correct_x0, model, x, asked)
            return sample if decode is None else unwrapped(decode(sample))
        hooks = hooks_of(options, decode)
        asked = options_of(self, model, x, options)
        loop = loop_of(self, model, x, asked, observed=hooks.callback is not None, borrows=True)
        result: Decoded = drive(loop, x, asked.seed, asked.index, asked.out, hooks)
        return result

    def iterate(self, model: Model, x: Tensor | Sequence[int], **options: Unpack[Options]) -> Iterator[Step]:
        """The same loop as a generator: yields a Step after each row; the last one's `x` is the sample.

        Takes what a call takes but callback, progress, decode and out. Arguments are checked at the call, not at the
        first step. `step.x` and `step.x0` are the loop's buffers: clone what you keep, as in
        `previews = [step.x0.clone() for step in sampler.iterate(...)]`. A `break` ends the run early; the last
        step's `x` and `x0` stay as they are then. Between steps the caller's own gradient mode is in force.
        """
        if misplaced := sorted({"callback", "progress", "decode", "out"} & set(options)):
            raise TypeError(f"iterate takes no {', '.join(misplaced)}: do that between the steps it yields")
        asked = options_of(self, model, x, options)
        loop = loop_of(self, model, x, asked, observed=True, borrows=True)
        with torch.set_grad_enabled(loop.differentiable):
            loop.start(x, asked.seed, asked.index)
        return shown(loop)

    def prepare(
        self,
        model: Model,
        x: Tensor | Sequence[int],
        *,
        decode: Decode[Decoded] | None = None,
        **options: Unpack[Undecoded],
    ) -> Prepared[Decoded]:
        """The same call with everything made beforehand, to be called again and again: for short runs.

        What a call of the sampler sets up anew each time (buffers, plans, checks of arguments) is set up once.

        Args:
            model, x: see fastsample.ddim; x is a shape, or the tensor that runs start from where they are given none.
            decode, **options: see fastsample.Options; all but `out`, which goes to the call.

        Returns:
            A fastsample.Prepared, called as `prepared(x, seed=, index=, model_kwargs=, cond=, uncond=, out=)`, all of
            them optional.

        Raises:
            ValueError, TypeError: for arguments that cannot work, and an x that requires gradients.

        Example:
            >>> act = Sampler(Table([500], p=2.0, q=-1.0, b=1.0)).prepare(lambda x, t, obs: obs * x, (1, 16, 7),
            ...                                                           model_kwargs={"obs": torch.zeros(1, 1, 1)})
            >>> act(model_kwargs={"obs": torch.ones(1, 1, 1)}).shape
            torch.Size([1, 16, 7])
        """
        if options.get("out") is not None:
            raise TypeError("prepare takes no out: give it to the call of what it returns")
        hooks = hooks_of(options, decode)
        asked = options_of(self, model, x, options)
        asked = asked._replace(**{name: copied(getattr(asked, name)) for name in COPIED})
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x requires gradients, which a prepared run does not compute: give x.detach()")
        make = functools.partial(loop_of, self, model, x, asked, observed=hooks.callback is not None)
        return Prepared(make, x, asked.seed, asked.index, asked._asdict(), hooks)

    def table_from(self, row: int) -> Table:
        """The table of a run that starts at this row, of the same length.

        Raises:
            ValueError: where the row, or one of the two after it, reads an entry from before it.
        """
        table = self.table
        if any(reads > k for k, reads in enumerate(table.reads[row:])):
            raise ValueError(f"{type(self).__name__} cannot start at row {row}, which needs entries of earlier rows")
        return table

    def _start(self, x: Tensor | Sequence[int], strength: float | None, start_step: int) -> tuple[Table, int]:
        """(the table, its row that the run starts at) for these options of a run."""
        if strength is None and type(start_step) is int and start_step == 0:
            if self._low_start is not None and not isinstance(x, Tensor):
                warn(self._low_start)
            return self.table, 0
        if strength is None:
            row = checked_start_step(start_step, len(self.table), x)
            return (self.table_from(row) if row else self.table), row
        return self._part(checked_strength(strength, start_step, x))

    def _part(self, strength: float) -> tuple[Table, int]:
        """(the table, its first row) of a run from a clean sample, as diffusers' image-to-image pipelines have it.

        That is the last `strength` of the rows, or one more where that row cannot be the first.
        """
        row = steps_left_out(len(self.table), strength)
        try:
            return (self.table_from(row) if row else self.table), row
        except ValueError:
            return self.table_from(row - 1), row - 1

    def _own_options(self, model: Model, x: Tensor | Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
        """These options with what this sampler alone takes expressed in what all take."""
        return options

    def _set(self, **attributes: object) -> None:
        if self.correct_x0 is not None:
            if not callable(self.correct_x0):
                raise TypeError(f"correct_x0 must be callable, got {self.correct_x0!r}")
            check_takes("correct_x0", self.correct_x0, "correct_x0(x0, t)", "a row's x0 and its times")
        # Samplers are frozen dataclasses: what __post_init__ works out goes past the lock.
        self.__dict__.update(attributes)
        for name in _FLAGS & self.__dict__.keys():
            if not isinstance(self.__dict__[name], bool | np.bool_):
                raise TypeError(f"{name} must be True or False, got {self.__dict__[name]!r}")
        if "clip" in self.__dict__:
            self.__dict__["clip"] = hashable(self.__dict__["clip"])
        if "table" in attributes and not self.quiet:
            self.__dict__["_warns"] = warn_of_amplified_errors(self.table)


def options_of(sampler: Sampler, model: Model, x: Tensor | Sequence[int], options: Mapping[str, Any]) -> RunOptions:
    """The options of a run of this sampler, by name, as one carrier.

    Raises:
        TypeError: for a name that neither fastsample.Options nor the sampler has.
    """
    given = sampler._own_options(model, x, dict(options))
    try:
        return RunOptions(**given)
    except TypeError:
        unknown = min(given.keys() - set(RunOptions._fields))
        raise no_option(type(sampler), unknown) from None


def loop_of(
    sampler: Sampler,
    model: Model,
    x: Tensor | Sequence[int],
    options: RunOptions,
    *,
    observed: bool = False,
    borrows: bool = False,
) -> Loop:
    """The loop over this sampler's table that these options ask for; observed and borrows as for Loop."""
    return Loop(sampler._start, sampler.correct_x0, model, x, options, observed=observed, borrows=borrows)
