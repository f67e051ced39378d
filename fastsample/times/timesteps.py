"""Which timesteps of a schedule a sampler visits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastsample.checks import integer, real_array
from fastsample.hints import hinting, meant_value
from fastsample.schedule import MOST_TIMESTEPS, Float64Array

Int64Array = NDArray[np.int64]

Spacing = Literal["leading", "trailing", "linspace", "quad", "respaced", "lcm"]
SpacingOfSchedule = Literal["auto", "ays_sd15", "ays_sdxl"]  # those that look at its noise levels
SpacingOfSolvers = Literal["karras", "log_snr"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
SPACINGS_OF_SAMPLERS: tuple[Spacing | SpacingOfSchedule, ...] = (*get_args(SpacingOfSchedule), *SPACINGS)
SPACINGS_OF_SOLVERS: tuple[str, ...] = (*SPACINGS_OF_SAMPLERS, *get_args(SpacingOfSolvers))

# Texts too: "ddim50" and "10,15,20" name timesteps.
Timesteps = Spacing | SpacingOfSchedule | str | Iterable[int]
_COUNTS = re.compile(r"ddim\d+|\d+(,\d+)*")


@hinting()
def spaced_timesteps(
    T: int, spec: Timesteps = "leading", steps: int | None = None, steps_offset: int = 0, original_steps: int = 50
) -> Int64Array:
    """The timesteps that a sampler visits, descending.

    Args:
        T: number of timesteps of the schedule.
        spec: one of
            - a spacing name, with `steps` (N): "leading" i * (T // N), "trailing" round(T - i * T / N) - 1 and
              "linspace" round(i * (T - 1) / (N - 1)) as in diffusers, "quad" floor((i * sqrt(0.8 T) / (N - 1))^2) as in
              ermongroup/ddim; rounding is half to even. "leading" ends well below T where N does not divide T, at 699
              for T = 1000 and N = 700; "trailing" starts from T - 1. "respaced" is "N" as below, one section. "lcm" are
              N of the M = original_steps timesteps i * (T // M) - 1, i = 1 .. M, that a consistency model was distilled
              at: number floor(j * M / N) from the top, as diffusers' LCMScheduler has it;
            - "ddimN": the smallest whole stride from 0 that visits exactly N (improved-diffusion);
            - "10,15,20": T cut in equal sections, each with so many evenly spaced timesteps (improved-diffusion);
            - the timesteps themselves, in any order.
        steps: how many timesteps, for a spacing name only; otherwise ignored.
        steps_offset: added to every "leading" timestep (Stable Diffusion uses 1); ignored otherwise, as in diffusers.
        original_steps: M of "lcm"; ignored otherwise.

    Returns:
        int64 array of distinct timesteps in [0, T), strictly descending.

    Raises:
        ValueError: for an unknown spacing, a count that cannot be reached, or timesteps that repeat or leave [0, T).

    Example:
        >>> spaced_timesteps(1000, "leading", steps=4)
        array([750, 500, 250,   0])
        >>> spaced_timesteps(1000, "10,10,5")[:3]
        array([999, 916, 833])
    """
    T = integer("T", T, 1, MOST_TIMESTEPS)
    steps_offset = integer("steps_offset", steps_offset, -T, T)
    check_spacing(spec, SPACINGS)
    if not isinstance(spec, str):
        timesteps = _explicit(spec)
    elif spec in _SPACINGS:
        timesteps = _SPACINGS[spec](T, _steps(T, spec, steps))
        if spec == "leading":
            timesteps = timesteps + steps_offset
    elif spec == "lcm":
        timesteps = _lcm(T, _steps(T, spec, steps), original_steps)
    elif spec.startswith("ddim"):
        timesteps = _ddim_stride(T, int(spec[4:]))
    else:
        timesteps = _sections(T, [int(part) for part in spec.split(",")])
    timesteps = np.sort(timesteps)[::-1].copy()
    if timesteps.size == 0:
        raise ValueError("timesteps must not be empty")
    if timesteps[0] >= T or timesteps[-1] < 0:
        bad = timesteps[0] if timesteps[0] >= T else timesteps[-1]
        raise ValueError(f"timestep {bad} lies outside [0, {T})")
    repeated = np.diff(timesteps) == 0
    if repeated.any():
        raise ValueError(f"timestep {timesteps[int(repeated.argmax())]} occurs twice ({spec!r}, steps={steps})")
    return timesteps


def check_spacing(spec: object, names: Sequence[str]) -> None:
    """Raises ValueError for a text that is none of these names, no "ddimN" and no counts of sections."""
    if not isinstance(spec, str) or spec in names or _COUNTS.fullmatch(spec):
        return
    meant = meant_value("timesteps", spec, names)
    if not meant and meant_value("timesteps", spec, SPACINGS_OF_SOLVERS):
        meant = f"; solvers, such as fastsample.euler, have {' and '.join(get_args(SpacingOfSolvers))}"
    raise ValueError(
        f"timesteps={spec!r} is no spacing: give one of {', '.join(names)}, 'ddimN', section counts such as "
        f"'10,15,20', or the timesteps themselves{meant}"
    )


def one_step_from_the_noisiest(T: int, spec: str | Iterable[float], t: NDArray) -> NDArray:
    """The timesteps t of a spec as samplers visit them: T - 1 where a spacing by name has a single one, else t.

    For a single step a peer's formula may give 0 ("leading", "linspace", "quad", "respaced"), next to clean data, or
    the middle; but one step leads from noise to the end. Sets with their own count ("1", "ddim1") and given timesteps
    stay.
    """
    return np.full_like(t, T - 1) if len(t) == 1 and isinstance(spec, str) and not spec[-1:].isdigit() else t


def descending_times(times: Iterable[float]) -> Float64Array:
    """The times as float64, descending.

    Raises:
        TypeError: for what is no list of numbers. ValueError: for an empty list, and times not finite or repeated.
    """
    try:
        values = real_array("timesteps", times if hasattr(times, "__array__") else list(times)).astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"timesteps must be a spacing's name or the times themselves, got {times!r}") from None
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"timesteps must be a non-empty list of finite numbers, got {times!r}")
    values = np.sort(values)[::-1]
    if (repeated := np.diff(values) == 0).any():
        raise ValueError(f"timestep {values[int(repeated.argmax())]} occurs twice")
    return values


def check_steps(steps: int | None) -> int:
    """The same number. Raises TypeError for what is no int, ValueError for less than one."""
    return integer("steps", steps, 1)


def check_steps_of_schedule(steps: int, T: int, most: int) -> int:
    """The same number. Raises TypeError for what is no int, ValueError for less than one or more than `most` of T."""
    count = integer("steps", steps)
    if not 1 <= count <= most:
        raise ValueError(f"steps must lie in [1, {most}] on a schedule of {T} timesteps, got {count}")
    return count


def _steps(T: int, spec: str, steps: int | None) -> int:
    if steps is None:
        raise ValueError(f"timesteps={spec!r} needs steps=")
    return check_steps_of_schedule(steps, T, T)


def _leading(T: int, steps: int) -> Int64Array:
    return np.arange(steps, dtype=np.int64) * (T // steps)


def _trailing(T: int, steps: int) -> Int64Array:
    # The slice guards against arange's extra element where T / steps is inexact.
    return np.round(np.arange(T, 0, -T / steps))[:steps].astype(np.int64) - 1


def _linspace(T: int, steps: int) -> Int64Array:
    return np.linspace(0, T - 1, steps).round().astype(np.int64)


def _quad(T: int, steps: int) -> Int64Array:
    return (np.linspace(0, np.sqrt(0.8 * T), steps) ** 2).astype(np.int64)


def _respaced(T: int, steps: int) -> Int64Array:
    return _sections(T, [steps])


_SPACINGS: dict[str, Callable[[int, int], Int64Array]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "quad": _quad,
    "respaced": _respaced,
}


def _lcm(T: int, steps: int, original_steps: int) -> Int64Array:
    original_steps = integer("original_steps", original_steps)
    if not 1 <= original_steps <= T:
        raise ValueError(f"original_steps must lie in [1, {T}] on a schedule of {T} timesteps, got {original_steps}")
    if steps > original_steps:
        raise ValueError(f"steps must not exceed original_steps={original_steps}, got {steps}")
    learned = np.arange(original_steps, 0, -1, dtype=np.int64) * (T // original_steps) - 1
    return learned[np.linspace(0, original_steps, steps, endpoint=False).astype(np.int64)]


def _explicit(spec: Iterable[int]) -> Int64Array:
    try:
        numbers = spec if hasattr(spec, "__array__") else list(spec)
    except TypeError:
        raise TypeError(f"timesteps must be a spacing's name or the timesteps themselves, got {spec!r}") from None
    if isinstance(numbers, list) and not numbers:
        return np.zeros(0, np.int64)
    try:
        values = real_array("timesteps", numbers)
    except TypeError:
        raise TypeError(f"timesteps must be integers, got {getattr(numbers, 'dtype', numbers)}") from None
    if values.ndim != 1:
        raise ValueError(f"timesteps must be one-dimensional, got shape {values.shape}")
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"timesteps must be integers, got {values.dtype}")
    if values.size and values.max() > np.iinfo(np.int64).max:  # unsigned ones would wrap
        raise ValueError(f"timesteps hold {values.max()}, beyond any schedule")
    return values.astype(np.int64)


def _ddim_stride(T: int, count: int) -> Int64Array:
    strides = np.arange(1, max(T, 2))
    reached = -(-T // strides)
    hit = np.flatnonzero(reached == count)
    if hit.size == 0:
        below, above = reached[reached < count], reached[reached > count]
        nearest = [f"ddim{n}" for n in (below.max(initial=0), above.min(initial=T + 1)) if 1 <= n <= T]
        raise ValueError(
            f"no whole stride visits exactly {count} of {T} timesteps; the nearest that work: {', '.join(nearest)}"
        )
    return np.arange(0, T, strides[hit[0]], dtype=np.int64)


def _sections(T: int, counts: list[int]) -> Int64Array:
    size, extra = divmod(T, len(counts))
    start, timesteps = 0, []
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if count > length:
            raise ValueError(f"section {i} of {T} timesteps holds {length}: cannot visit {count} of them")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            # Summed, not multiplied: the published sets carry this rounding.
            position += stride
        start += length
    return np.array(timesteps, dtype=np.int64)


def apart(timesteps: Int64Array, T: int) -> Int64Array:
    """Timesteps in descending order as distinct ones: where some are equal, they move apart.

    Example:
        >>> apart(np.array([9, 9, 3, 0, 0]), 10).tolist()
        [9, 8, 3, 1, 0]
    """
    # From the clean end up, each at least one above the one before, and below what those above it need.
    place = np.arange(len(timesteps))
    rising = np.maximum.accumulate(timesteps[::-1] - place) + place
    falling: Int64Array = np.minimum(rising, T - len(timesteps) + place)[::-1]
    return falling
