"""The base of schedulers whose steps lead from one alpha bar of a schedule to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.integrations.diffusers.base import DropIn, Rows
from fastsample.ops.tracing import traced
from fastsample.samplers.diffusers.alpha_bars import alpha_bars
from fastsample.samplers.diffusers.reading import Reading
from fastsample.schedule import Float64Array
from fastsample.tables import Table


class AlphaBars(DropIn):
    """Of DDIM, DDPM, LCM and TCD: adds noise with coefficients in float32, and leaves the schedule where it is."""

    alphas_cumprod: Tensor

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar_t) x0 + sqrt(1 - abar_t) z, in float32 at least: half precision rounds alpha bars to 1.

        With compat="diffusers" in the dtype of the samples.
        """
        if not self.corrects:
            return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]  # of the peer
        alpha, sigma = self._coefficients(original_samples, timesteps)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar_t) z - sqrt(1 - abar_t) x0, computed as in add_noise."""
        if not self.corrects:
            return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc]
        alpha, sigma = self._coefficients(sample, timesteps)
        return (alpha * noise - sigma * sample).to(sample.dtype)

    def _coefficients(self, sample: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        abar = self._alpha_bars_on(sample.device)[timesteps.to(sample.device)].flatten()
        abar = abar.to(torch.promote_types(sample.dtype, torch.float32))
        return per_sample(abar.sqrt(), sample), per_sample((1 - abar).sqrt(), sample)

    def _alpha_bars_on(self, device: torch.device) -> Tensor:
        schedule = self.alphas_cumprod
        if schedule.device == device:
            return schedule
        moved = self.__dict__.get("_moved_schedule")
        if moved is None or moved[0] is not schedule or moved[1].device != device:
            moved = self.__dict__["_moved_schedule"] = schedule, schedule.to(device)
        found: Tensor = moved[1]
        return found


class AnyTimestep(AlphaBars):
    """Of DDIM, its inverse and DDPM, whose steps need no count: rows are found by their timesteps alone."""

    def _found(self, timestep: int | Tensor, eta: float = 0.0, *options: object) -> tuple[Rows, int | Tensor | None]:
        """The rows and which of them is this timestep's; None where it has none."""
        rows = self._rows(eta, *options, False)
        if isinstance(timestep, Tensor) and timestep.ndim and timestep.numel() == 1:
            timestep = timestep.reshape(())  # of all samples
        if not (isinstance(timestep, Tensor) and (timestep.ndim or traced(timestep))):
            place = self._place(timestep, rows)
            if place is not None:
                return rows, place
        rows = self._rows(eta, *options, True)
        if isinstance(timestep, Tensor) and (timestep.ndim or not timestep.is_cpu or traced(timestep)):
            return rows, rows.table.derived(("row of", timestep.device), lambda _: _row_of(rows, timestep))[timestep]
        return rows, self._place(timestep, rows)


def _row_of(rows: Rows, timestep: Tensor) -> Tensor:
    """The row of each timestep, where the schedule's timesteps lie; of those that have none one that does not exist."""
    found = torch.full((max(map(int, rows.row_of)) + 1,), len(rows.table), dtype=torch.int64)
    for t, row in rows.row_of.items():
        found[int(t)] = row
    return found.to(timestep.device)


def with_others(reading: Reading, everywhere: bool) -> NDArray[np.int64]:
    """The reading's timesteps, and after them, where asked for, all others of the schedule."""
    listed = reading.t.astype(np.int64)
    if not everywhere:
        return listed
    return np.append(listed, np.setdiff1d(np.arange(len(reading.array("alphas_cumprod"))), listed))


def valid(reading: Reading, *levels: NDArray[Any]) -> NDArray[np.bool_]:
    """Where alpha bars, those of rows first, tell x0 and lie between 0 and 1, so that there is a row.

    Elsewhere diffusers' own step has NaN or infinities; from an alpha bar of 0 it may have them.
    """
    now = levels[0]
    prediction = reading.options["prediction_type"]
    told = now > 0 if prediction == "epsilon" or not reading.corrects else now < np.inf
    told &= (now < 1) | (prediction != "sample")
    found: NDArray[np.bool_] = np.logical_and.reduce([told, *((one >= 0) & (one <= 1) for one in levels)])
    return found


def levels_of(reading: Reading, t: NDArray[Any], final: float) -> Float64Array:
    """Alpha bars at timesteps t, `final` below 0, NaN beyond the schedule."""
    known = len(reading.array("alphas_cumprod"))
    found: Float64Array = np.where(t < known, alpha_bars(reading, np.minimum(t, known - 1), final), np.nan)
    return found


def rows_of(t: NDArray[np.int64], columns: Mapping[str, Any] | None, draws: NDArray[np.bool_]) -> Rows:
    """The rows of these columns at timesteps t, the first of each; none where no timestep is left."""
    if columns is None or len(t) == 0:
        return Rows(Table([0]), {}, [False])
    row_of = {time: row for row, time in reversed(list(enumerate(t.tolist())))}
    return Rows(Table(**columns), row_of, draws.tolist())
