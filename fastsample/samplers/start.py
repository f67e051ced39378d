"""Which rows a run leaves out at the start, where it begins part-way."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastsample.checks import check_number, integer
from fastsample.loop.start import checked_start


def checked_start_step(start_step: int, rows: int, x: Tensor | Sequence[int]) -> int:
    """`start_step` as an int, for a table of that many rows.

    Raises:
        TypeError, ValueError: where it is none of these rows, or x is no state before it.
    """
    row = integer("start_step", start_step)
    if not 0 <= row < rows:
        raise ValueError(f"start_step must lie in [0, {rows}), got {row}")
    if row and not _is_tensor(x):
        raise ValueError("start_step needs the state before that row as x, not a shape")
    return row


def checked_strength(strength: float, start_step: int, x: Tensor | Sequence[int]) -> float:
    """`strength` as a float.

    Raises:
        TypeError, ValueError: for a strength outside (0, 1], beside a start_step, and without clean samples.
    """
    if start_step:
        raise ValueError("give strength= (x is clean) or start_step= (x is noisy already), not both")
    if not _is_tensor(x):
        raise ValueError("strength needs a clean sample as x, not a shape")
    check_number("strength", strength)
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    return float(strength)


def steps_left_out(steps: int, strength: float, *, kept_part: bool = False, unit: str = "rows") -> int:
    """How many of the steps a run from a clean sample leaves out at the start: steps - floor(steps strength).

    `kept_part` runs the step that only a part of is asked for too, floor(steps - steps strength), as diffusers'
    pipelines of flow models (Stable Diffusion 3, Flux) do. Both are in floating point, as there.

    Raises:
        ValueError: where no step is left.
    """
    left_out = int(steps - steps * strength) if kept_part else steps - int(steps * strength)
    if left_out == steps:
        raise ValueError(f"strength must lie in (0, 1] and leave at least one of {steps} {unit}, got {strength}")
    return left_out


def _is_tensor(x: Tensor | Sequence[int]) -> bool:
    """Whether x is a tensor and no shape; raises where it is neither."""
    checked_start(x)
    return isinstance(x, Tensor)
