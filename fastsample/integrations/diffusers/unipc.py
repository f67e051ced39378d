"""UniPCMultistepScheduler.

Where nobody changes the state between steps its correction can be taken together with the next prediction, as
fastsample.unipc does. In a pipeline somebody may, to inpaint for instance: a correction starts from the state that the
last step itself started from, so it is a pass of its own here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastsample.integrations.diffusers.base import Rows, check_begun, check_given
from fastsample.integrations.diffusers.multistep import Counted, no_rows, rows_in_turn
from fastsample.samplers.diffusers import multistep
from fastsample.samplers.diffusers.multistep import UniPCMultistep
from fastsample.samplers.diffusers.reading import Reading
from fastsample.tables import Table

# A table's first rows must not read history, as these do: rows that nobody runs go before them.
_BEFORE = 3


class Passes(NamedTuple):
    """The passes of steps that correct. Their tables have a row for each step, after _BEFORE others.

    Attributes:
        correct: from the sample and the model's output the entry and the corrected state, of the last two entries and,
            as a third, what the step before carried over.
        predict: from the corrected state and the entry, as if that were the model's output, the next sample.
        carry: from the corrected state and the third entry what the step carries over.
        reads: of each step how many earlier entries its prediction reads.
        carries: of each step whether `carry` is to be taken; otherwise the corrected state itself is carried over.
        corrects: of each step whether it corrects.
    """

    correct: Table
    predict: Table
    carry: Table
    reads: tuple[int, ...]
    carries: tuple[bool, ...]
    corrects: tuple[bool, ...]


class UniPCMultistepScheduler(Counted, diffusers.UniPCMultistepScheduler):
    """diffusers' UniPCMultistepScheduler with a step of two passes: one corrects, one predicts.

    With solver_type="bh1" and final_sigmas_type="zero" diffusers' last step is not finite; here it is.

    Args:
        compat, **options: see DDIMScheduler. A first timestep that is there twice is an error with compat.
            solver_p is not covered.

    Example:
        >>> scheduler = UniPCMultistepScheduler(use_karras_sigmas=True)
        >>> scheduler.set_timesteps(4)
        >>> x = torch.ones(1, 4, 8, 8)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(0.1 * x, t, x).prev_sample
        >>> x.shape
        torch.Size([1, 4, 8, 8])
    """

    kind = multistep.KINDS["UniPCMultistepScheduler"]
    output = SchedulerOutput
    sigmas: Tensor
    last_sample: Tensor | None

    def output_dtypes(self, model_output: torch.dtype, sample: torch.dtype) -> tuple[torch.dtype, ...]:
        return (sample,)

    def _check_options(self) -> None:
        super()._check_options()
        if self._internal_dict["solver_p"] is not None:
            raise ValueError("solver_p, a predictor of another kind, is not covered: leave it out")

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at the next sigma; see diffusers."""
        check_begun(self.num_inference_steps)
        check_given(model_output, sample)
        row = self._next(timestep)
        rows = self._rows(0.0, self._first)
        if not rows.there[row]:
            return super().step(model_output, timestep, sample, return_dict)
        passes: Passes = rows.passes
        k, history = row + _BEFORE, self._history(3)
        if passes.corrects[row] and self.last_sample is not None:
            given = *[*history, *history[-1:]][:2], self.last_sample
            state, entry = self._advanced(rows._replace(table=passes.correct), k, model_output, sample, None, given)
            earlier = history[: passes.reads[row]]
            predict = rows._replace(table=passes.predict)
            out, _ = self._advanced(predict, k, entry, state, None, earlier, keeps_entry=False)
        else:
            state = sample
            out, entry = self._advanced(rows, row, model_output, sample, None, history[: rows.table.reads[row]])
        if passes.carries[row]:
            carry = rows._replace(table=passes.carry)
            state, _ = self._advanced(carry, k, state, state, None, history[1:2], keeps_entry=False)
        self.last_sample = state
        self._remember(entry)
        (out,) = self._results(model_output, sample, out)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _make_rows(self, reading: Reading, *options: Any) -> Rows:
        (first,) = options
        try:
            sampler = self.kind.make(reading)
            assert isinstance(sampler, UniPCMultistep)
            plain = replace(sampler, disable_corrector=range(len(reading.t)))
            table = plain.table_from(first) if first else plain.table
            passes = _passes(sampler, first)
        except ValueError:  # where some step is not finite
            return no_rows(reading)
        return rows_in_turn(reading, table, passes=passes)


def _passes(sampler: UniPCMultistep, first: int) -> Passes:
    a, predicted, moved = sampler.parts_from(first)
    table, steps = sampler.table, len(a)
    # What the corrector of a row has of the entries of the row before and of those before that.
    before = np.zeros((steps, 3))
    before[1:] = predicted[:-1, :3] + moved[:-1, 1:]
    corrects = np.append(False, moved[:-1, 0] != 0)
    carries = np.append((predicted[:, 2] + moved[:, 3])[:-1] != 0, False)
    kept = np.append(0.0, np.where(carries, 1.0, a)[:-1])
    of_entry = np.append(0.0, moved[:-1, 0])
    columns = {name: getattr(table, name) for name in ("p", "q", "limit", "quantile", "hx", "h0")}
    columns |= {"a": of_entry * table.hx, "b": of_entry * table.h0}
    correct = _after_others({**columns, "c1": before[:, 0], "c2": before[:, 1], "c3": kept}, limit=np.inf)
    predict = _after_others({"a": a, "d": predicted[:, 0], "c1": predicted[:, 1], "c2": predicted[:, 2]})
    carry = _after_others({"a": a, "c1": np.append(before[1:, 2], 0.0)})
    reads = tuple(predict.reads[_BEFORE:])
    return Passes(correct, predict, carry, reads, tuple(carries.tolist()), tuple(corrects.tolist()))


def _after_others(columns: Mapping[str, Any], **others: float) -> Table:
    full: dict[str, Any] = {
        name: np.append(np.full(_BEFORE, others.get(name, 0.0)), values) for name, values in columns.items()
    }
    return Table(np.zeros(len(next(iter(full.values()))), np.int64), **full)
