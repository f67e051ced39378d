"""The buffers of a Batcher, and the model call that takes every sample in them to its next row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample.loop.guidance import guidance_of
from fastsample.loop.model_input import ModelInput
from fastsample.loop.options import RunOptions
from fastsample.loop.turns import plans_in_turn
from fastsample.model import Predictor
from fastsample.ops.memory import ordinary_tensors
from fastsample.ops.noise import INITIAL, fill
from fastsample.ops.step.prepared import StepPlan
from fastsample.tables import Table


@dataclass
class _Turn:
    """A batch between two model calls: what the next one reads, and the plan that writes the turn after it."""

    state: Tensor
    targets: tuple[Tensor, ...]
    model_input: Tensor
    rows: Tensor
    plan: StepPlan


class Places:
    """The places of a batch, and a model call for all of them.

    A model call reads the buffers of one turn and writes those of the next, so that until the caller counts it as made
    it may fail or be interrupted anywhere, and be made again. Where rows read two earlier x0 there are three turns.

    Args:
        shape: of one sample.
        cond, uncond: the model's keywords for one sample, without a batch axis.
        batch: the number of places.
        predict: the model.
        table: the rows of every sample.
        options: guidance and the keywords that all samples share; cond and uncond in it are replaced.
        device, backend: where and by what the rows run.

    Attributes:
        shape: of one sample.
        cond: the keywords that each sample has its own of, (batch, ...).
        idle_row: the row, behind those of the table, that a place is at before a sample and after it.
    """

    def __init__(
        self,
        shape: torch.Size,
        cond: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor],
        *,
        batch: int,
        predict: Predictor,
        table: Table,
        options: RunOptions,
        device: torch.device,
        backend: str,
    ) -> None:
        def batched(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            # Also where nobody is, the model is given what it can work with.
            return {name: value.expand(batch, *value.shape).clone() for name, value in values.items()}

        self.shape, self._predict, self._table, self._backend = shape, predict, _with_idle_row(table), backend
        self.idle_row = len(table)
        # Buffers must be ordinary tensors also where the caller is in inference mode.
        with ordinary_tensors():
            state = torch.empty((batch, *shape), dtype=torch.float32, device=device)
            asked = options._replace(cond=batched(cond), uncond=batched(uncond))
            self._guidance = guidance_of(state, asked, predict.known_dtype)
            self._guided = predict.guided = self._guidance.weights is not None
            self._keywords = self._guidance.both if self._guided else self._guidance.conditional
            self.cond = {name: self._keywords[name][-batch:] for name in cond}
            self._keys = torch.zeros(batch, dtype=torch.int64, device=device)
            self._times = torch.tensor(self._table.t, device=device)
            following = [*range(1, len(table) + 1), self.idle_row]
            self._row_after = torch.tensor(following, dtype=torch.int64, device=device)
            self._own_times = self._times.new_empty(batch)
            self._time = self._times.new_empty(2 * batch if self._guided else batch)
            self._time_halves = self._time.view(-1, batch)
            self._turns = self._make_turns(state)

    def _make_turns(self, state: Tensor) -> list[_Turn]:
        table, idle = self._table, self.idle_row
        count = max(2, table.history + 1)
        inputs = [
            ModelInput(
                state.shape,
                state.dtype,
                state.device,
                self._predict.dtype,
                scaled=table.scaled,
                guided=self._guided,
            )
            for _ in range(count)
        ]
        for model_input in inputs:
            model_input.state.zero_()
            model_input.fill(1.0)
        # Beside the state, and not read: on a GPU, asking for a row would wait for all work before it.
        rows = [torch.full((len(state),), idle, dtype=torch.int64, device=state.device) for _ in inputs]
        x0 = [torch.zeros_like(state) for _ in inputs] if table.history else []
        plans = plans_in_turn(
            inputs,
            x0,
            table,
            self._backend,
            writes_input=True,
            rows=rows,
            keys=self._keys,
            guidance=self._guidance.weights,
            rescale=self._guidance.rescale,
        )
        guided = self._guided
        return [
            _Turn(own.state, own.targets, own.views[guided], row, plan)
            for own, row, plan in zip(inputs, rows, plans, strict=True)
        ]

    def enter(self, turn: int, i: int, key: Tensor, cond: Mapping[str, Tensor]) -> None:
        """Starts a sample in place i: its noise, the input made from it, its keywords, row 0."""
        own, now = slice(i, i + 1), self._turns[turn]
        state = now.state[own]
        self._keys[own] = key
        fill(state, self._keys[own], 0, INITIAL, self._backend)
        state.mul_(self._table.init_noise_sigma)
        for target in now.targets:
            torch.mul(state, float(self._table.e[0]), out=target[own])
        for name, value in cond.items():
            self.cond[name][i] = value
        now.rows[i] = 0

    def advance(self, turn: int) -> int:
        """One model call and one row for every place; returns the turn that then holds them."""
        now, following = self._turns[turn], (turn + 1) % len(self._turns)
        self._time_halves.copy_(torch.index_select(self._times, 0, now.rows, out=self._own_times))
        # Not the buffers themselves: a model that gives its arguments other memory, `x.data = ...`, must not move them.
        lent = {**self._keywords, **{name: self._keywords[name].detach() for name in self.cond}}
        m = self._predict(now.model_input.detach(), self._time.detach(), lent)
        now.plan(m, 0)
        torch.index_select(self._row_after, 0, now.rows, out=self._turns[following].rows)
        return following

    def writes(self, turn: int) -> int:
        """How often torch has seen what the model reads written to."""
        return self._turns[turn].model_input._version

    def sample(self, turn: int, i: int) -> Tensor:
        """What place i holds, in memory of its own."""
        with ordinary_tensors():
            return self._turns[turn].state[i].clone()

    def empty(self, turn: int, i: int) -> None:
        """Fills place i with zeros."""
        now = self._turns[turn]
        for buffer in (now.state, *now.targets):
            buffer[i].zero_()


def _with_idle_row(table: Table) -> Table:
    """The table with one more row for places that nobody has: it reads nothing and writes zeros."""
    rows = list(table)
    rows.append({**dict.fromkeys(rows[0], 0.0), "t": rows[-1]["t"], "limit": np.inf, "e": 1.0})
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    return Table(**columns, init_noise_sigma=table.init_noise_sigma, box=table.box)
