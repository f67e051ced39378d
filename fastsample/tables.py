"""A sampler is a table: one row of coefficients per model call, computed once in float64.

Row k turns the state x, the model's output m and standard normals z into the next state:

    x0 = clamp(p*x + q*m, -limit, limit)
    x' = a*x + b*x0 + d*m + s*z

Where limit is infinite the x0 term folds into the others: x' = (a + b*p)*x + (b*q + d)*m + s*z.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastsample.schedule import Float64Array, Schedule

PREDICTIONS = ("epsilon", "v", "x0")

# Defaults of the columns that a sampler does not set.
_COLUMNS = {
    "p": 0.0,
    "q": 0.0,
    "a": 0.0,
    "b": 0.0,
    "d": 0.0,
    "s": 0.0,
    "limit": np.inf,
}


class Table:
    """The coefficients of one sampler on one schedule, a row per model call, noisiest first. Immutable.

    Args:
        t: the time that the model is given in each row, shape (N,): int64, or float32 where a method says so.
        **columns: any of p, q, a, b, d, s, limit as numbers or arrays of shape (N,); those left
            out are 0 and limit is infinite (no clamp).

    Attributes:
        t: as given, read-only.
        p, q, a, b, d, s, limit: read-only float64 arrays of shape (N,).
        packed: what kernels read, float32 of shape (N, 9): these columns in this order, then the folded a + b*p and
            b*q + d (folded in float64, every number rounded once).
        packed_address: where `packed` starts in memory.
        stochastic: for each row whether it adds noise (s is not 0).

    Raises:
        ValueError: for no rows, an unknown column, a wrong shape, NaN, an infinite coefficient or a negative limit.

    Example:
        >>> Table([999, 0], p=1.0, q=-1.0, b=1.0)
        Table of 2 rows: x0 = p x + q m, clamped to limit; x' = a x + b x0 + d m + s z
          k    t           p           q           b
          0  999           1          -1           1
          1    0           1          -1           1
    """

    t: NDArray[np.int64] | NDArray[np.float32]
    p: Float64Array
    q: Float64Array
    a: Float64Array
    b: Float64Array
    d: Float64Array
    s: Float64Array
    limit: Float64Array
    packed: NDArray[np.float32]
    packed_address: int
    stochastic: tuple[bool, ...]

    def __init__(self, t: ArrayLike, **columns: ArrayLike) -> None:
        times = np.array(t)
        if times.ndim != 1 or times.size == 0:
            raise ValueError(f"t must be a non-empty 1-D array, got shape {times.shape}")
        times = times.astype(np.int64 if np.issubdtype(times.dtype, np.integer) else np.float32)
        if not np.isfinite(times).all():
            row = int(np.flatnonzero(~np.isfinite(times))[0])
            raise ValueError(f"t is {times[row]} in row {row}")
        if unknown := sorted(set(columns) - set(_COLUMNS)):
            raise ValueError(f"a table has no column {', '.join(unknown)}; its columns are {', '.join(_COLUMNS)}")
        full = {"t": times}
        for name, default in _COLUMNS.items():
            given = np.asarray(columns.get(name, default), dtype=np.float64)
            if given.shape not in ((), times.shape):
                raise ValueError(f"column {name} must have shape {times.shape}, got {given.shape}")
            column = np.full(times.shape, given)
            if name == "limit" and not (column > 0).all():
                raise ValueError(f"column limit must be positive, got {column.min()}")
            if name != "limit" and not np.isfinite(column).all():
                row = int(np.flatnonzero(~np.isfinite(column))[0])
                raise ValueError(f"column {name} is {column[row]} in row {row} (t = {times[row]})")
            full[name] = column
        full["packed"] = _pack(full)
        for array in full.values():
            array.setflags(write=False)
        self.__dict__.update(full)
        self.__dict__["packed_address"] = full["packed"].ctypes.data
        self.__dict__["stochastic"] = tuple((full["s"] != 0).tolist())

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Table is immutable: cannot set {name!r}; use .replace({name}=...)")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.t, {name: getattr(self, name) for name in _COLUMNS})

    def replace(self, **columns: ArrayLike) -> Table:
        """A new table with these columns in place of the old ones (`t` included)."""
        current = {name: getattr(self, name) for name in ("t", *_COLUMNS)}
        return Table(**{**current, **columns})

    def __len__(self) -> int:
        return self.t.size

    def __iter__(self) -> Iterator[dict[str, float]]:
        """The rows in order, each a dict of its t and its coefficients."""
        names = ("t", *_COLUMNS)
        for values in zip(*(getattr(self, name) for name in names), strict=True):
            yield dict(zip(names, (value.item() for value in values), strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Table):
            return NotImplemented
        same_time = self.t.dtype == other.t.dtype
        return same_time and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in ("t", *_COLUMNS))

    def __hash__(self) -> int:
        return hash((self.t.tobytes(), (self.packed + 0.0).tobytes()))  # -0.0 equals 0.0

    def __repr__(self) -> str:
        shown = [name for name, default in _COLUMNS.items() if (getattr(self, name) != default).any()]
        width = max(len(str(value)) for value in self.t.tolist())
        formula = "x0 = p x + q m, clamped to limit; x' = a x + b x0 + d m + s z"
        names = "".join(f"{name:>12}" for name in shown)
        lines = [f"Table of {len(self)} rows: {formula}", f"  k {'t':>{width + 1}}{names}"]
        head = len(self) if len(self) <= 60 else 10
        for k in (*range(head), *range(max(head, len(self) - 10), len(self))):
            if k == len(self) - 10 and k > head:
                lines.append("  ...")
            cells = "".join(f"{getattr(self, name)[k]:12.5g}" for name in shown)
            lines.append(f"{k:>3} {self.t[k]:>{width + 1}}{cells}")
        return "\n".join(lines)


def _pack(columns: dict[str, NDArray]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        folded_x = columns["a"] + columns["b"] * columns["p"]
        folded_m = columns["b"] * columns["q"] + columns["d"]
        stacked = [*(columns[name] for name in _COLUMNS), folded_x, folded_m]
        packed = np.stack(stacked, axis=1).astype(np.float32)
    if np.isinf(np.delete(packed, list(_COLUMNS).index("limit"), axis=1)).any():
        raise ValueError("a coefficient of the table overflows float32")
    return packed


def _rebuild(t: NDArray, columns: dict[str, NDArray]) -> Table:
    return Table(t, **columns)


def noise_levels(
    schedule: Schedule, timesteps: NDArray[np.int64], final_alpha_cumprod: float = 1.0
) -> tuple[Float64Array, Float64Array]:
    """(alpha, sigma), each of shape (N + 1,): x_t = alpha*x0 + sigma*z at the N timesteps and, last, at the end.

    For an alpha bar schedule alpha = sqrt(abar) and sigma = sqrt(1 - abar). `final_alpha_cumprod` is the alpha bar
    after the last row: 1 (clean data), or `schedule.alphas_cumprod[0]` as Stable Diffusion's scheduler has it.

    Raises:
        ValueError: where it is outside (0, 1] or lies below the alpha bar of the last timestep.
    """
    visited = schedule.alphas_cumprod[timesteps]
    if not max(0.0, visited[-1]) <= final_alpha_cumprod <= 1 or final_alpha_cumprod == 0:
        raise ValueError(
            f"final_alpha_cumprod must lie in (0, 1] and not below {visited[-1]:.6g}, the alpha bar of the last "
            f"timestep {timesteps[-1]}; got {final_alpha_cumprod}"
        )
    alpha_bar = np.append(visited, final_alpha_cumprod)
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def x0_coefficients(prediction: str, alpha: Float64Array, sigma: Float64Array) -> tuple[Float64Array, Float64Array]:
    """(p, q) with x0 = p*x + q*m for a model that predicts epsilon, v (alpha^2 + sigma^2 = 1) or x0.

    Raises:
        ValueError: for another prediction, and for epsilon where alpha is 0: x0 cannot be told from pure noise.
    """
    if prediction == "epsilon":
        if (alpha == 0).any():
            raise ValueError(
                "prediction='epsilon' cannot work where alpha bar is 0 (zero terminal SNR): leave that timestep out or "
                "use a model that predicts v or x0"
            )
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        return alpha, -sigma
    if prediction == "x0":
        return np.zeros_like(alpha), np.ones_like(alpha)
    raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")


def epsilon_coefficients(
    prediction: str, alpha: Float64Array, sigma: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """(r, u) with epsilon = r*x + u*m, the direction that the model's own output implies, before x0 is limited.

    Raises:
        ValueError: for x0 prediction where sigma is 0: clean data do not tell the noise.
    """
    if prediction == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "v":
        return sigma, alpha
    return rederived_epsilon_coefficients(alpha, sigma)


def rederived_epsilon_coefficients(alpha: Float64Array, sigma: Float64Array) -> tuple[Float64Array, Float64Array]:
    """(r, w) with epsilon = r*x + w*x0, the direction that a limited or corrected x0 implies.

    Raises:
        ValueError: where sigma is 0.
    """
    if (sigma == 0).any():
        raise ValueError("epsilon cannot be derived from x0 where alpha bar is 1: leave that timestep out")
    return 1 / sigma, -alpha / sigma
