"""A sampler is a table: one row of coefficients per model call, computed once in float64.

Row k gives the model e*x and turns the state x, the model's output m (after guidance) with its variance half v, the
entries of the last three rows h1, h2 and h3, and standard normals z into the next state:

    x0 = limit(p*x + q*m)
    h  = hx*x + h0*x0
    x' = a*x + b*x0 + c1*h1 + c2*h2 + c3*h3 + d*m + s*exp(g0 + g1*v)*z

h is the row's own entry, which later rows read: x0, or epsilon of solvers that remember that. limit is a clamp to
[-limit, limit]; where quantile > 0, per sample, with r = clamp(quantile of |x0|, 1, limit), it is clamp(x0, -r, r) / r.
Where neither is in force the x0 terms fold into the others: x' = (a + b*p)*x + (b*q + d)*m + ... and
h = (hx + h0*p)*x + h0*q*m.

A row as a tableau, a line for each sum, a column for each operand:

              x    m    x0   h1   h2   h3   z
    model     e
    x0        p    q
    h         hx        h0
    x'        a    d    b    c1   c2   c3   s exp(g0 + g1*v)

The letters and what papers call them. abar is the product of 1 - beta, a level is (alpha, sigma): (sqrt(abar),
sqrt(1 - abar)) of a diffusion, (1, sigma) of EDM, (1 - t, t) of a flow; a prime marks the level that the row leads to.

    e         c_in of EDM, 1 / sqrt(sigma^2 + sigma_data^2): what the model's input is scaled by.
    p, q      c_skip and c_out of EDM. For a model of the noise 1 / alpha and -sigma / alpha, improved-diffusion's
              sqrt_recip_alphas_cumprod and (negative) sqrt_recipm1_alphas_cumprod.
    limit     The range of clip_denoised or clip_sample: 1 for images.
    quantile  The percentile p of Imagen's dynamic thresholding.
    a, b      DDPM's posterior mean, posterior_mean_coef2 of x and posterior_mean_coef1 of x0. In DPM-Solver++'s first
              order sigma' / sigma and -alpha' (exp(-h) - 1).
    c1 .. c3  The multistep terms of DPM-Solver++, the parts of its D that come from one and from two rows ago; of iPNDM
              and DEIS the Adams-Bashforth coefficients, times the step, of earlier epsilon.
    hx, h0    What an earlier epsilon is of x and x0: 1 / sigma and -alpha / sigma.
    d         DDIM's direction pointing to x_t, sqrt(1 - abar' - sigma_t^2), where the model tells the noise.
    s         The deviation of the new noise: DDIM's sigma_t, DDPM's sqrt(beta~), sigma_up of ancestral samplers.
    g0, g1    Half the log variance that improved-diffusion learns, g0 + g1*v = (v log beta + (1 - v) log beta~) / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastsample.checks import checked_bounds, real, real_array
from fastsample.hints import meant_argument
from fastsample.schedule import Float64Array

# Defaults of the columns that a sampler does not set.
COLUMNS = {
    "p": 0.0,
    "q": 0.0,
    "a": 0.0,
    "b": 0.0,
    "c1": 0.0,
    "c2": 0.0,
    "c3": 0.0,
    "d": 0.0,
    "s": 0.0,
    "g0": 0.0,
    "g1": 0.0,
    "limit": np.inf,
    "quantile": 0.0,
    "hx": 0.0,
    "h0": 1.0,
    "e": 1.0,
}
# What each of the 16 floats of a packed row is, in order; csrc/common/row.h declares the same. s is s exp(g0), g1 is
# g1 / ln 2, since kernels take powers of 2; next_e is e of the next row, whose input a pass writes. Rows that do not
# limit x0 are folded: p and q make the entry, a and d all of x' that x and m have in it. What is unused is 0.
ROW = (
    *("p", "q", "a", "b", "c1", "c2", "c3", "d", "s", "g1", "limit", "quantile", "next_e", "hx", "h0"),
    *("unused",),
)
HISTORY = ("c1", "c2", "c3")  # what reads the entry of the last row, of the one before, and of the one before that
_LEVELS = ("alpha", "sigma")
LEAST = 2.0**-150  # which float32 rounds to 0

_T = TypeVar("_T")


class Table:
    """The coefficients of one sampler on one schedule, a row per model call, noisiest first. Immutable.

    Args:
        t: the time that the model is given in each row, shape (N,): int64, or float32 where a method says so.
        alpha, sigma: the noise levels that the rows lead through, both or neither, shape (N + 1,): the state before row
            k is alpha[k]*x0 + sigma[k]*z, after the last row alpha[N]*x0 + sigma[N]*z.
        init_noise_sigma: the state before row 0 is drawn as init_noise_sigma * z.
        box: (low, high) of x0 in rows that limit it, in place of -limit and limit: numbers or arrays that broadcast to
            a sample, without its batch axis; float32.
        **columns: any of p, q, a, b, c1, c2, c3, d, s, g0, g1, limit, quantile, hx, h0, e as numbers or arrays of shape
            (N,); those left out are 0, but limit is infinite (no clamp), and h0 and e are 1.

    Attributes:
        t, alpha, sigma, init_noise_sigma, box: as given, arrays read-only.
        p, q, a, b, c1, c2, c3, d, s, g0, g1, limit, quantile, hx, h0, e: read-only float64 arrays of shape (N,).
        packed: what kernels read, float32 of shape (N, 16), laid out as `ROW` (folded in float64, every number rounded
            once).
        packed_address: where `packed` starts in memory.
        stochastic: for each row whether it adds noise (s is not 0).
        learned: for each row whether it reads the variance half (g1 is not 0).
        keeps_entry: for each row whether a later one reads its entry.
        reads: for each row how many earlier entries it reads: 0 to 3 (h1, h2 and h3).
        history: the largest of these.
        remembers_x0: whether entries are x0 itself.
        thresholded, scaled: whether any row has a quantile, an e other than 1.
        times: t as Python numbers.
        levels: for each row the (alpha, sigma) that it leads to, NaN for a table without levels.

    Raises:
        ValueError: for no rows, an unknown column, a wrong shape, NaN, an infinite coefficient, a limit that is not
            positive, a quantile outside [0, 1], e = 0, history that is read before there is any, and a box that is not
            finite, has a low above its high, or comes with a quantile.

    Example:
        >>> Table([999, 0], p=1.0, q=-1.0, b=1.0)
        Table of 2 rows: x0 = p x + q m; x' = b x0
          k    t           p           q           b
          0  999           1          -1           1
          1    0           1          -1           1
    """

    t: NDArray[np.int64] | NDArray[np.float32]
    p: Float64Array
    q: Float64Array
    a: Float64Array
    b: Float64Array
    c1: Float64Array
    c2: Float64Array
    c3: Float64Array
    d: Float64Array
    s: Float64Array
    g0: Float64Array
    g1: Float64Array
    limit: Float64Array
    quantile: Float64Array
    hx: Float64Array
    h0: Float64Array
    e: Float64Array
    alpha: Float64Array | None
    sigma: Float64Array | None
    init_noise_sigma: float
    box: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    packed: NDArray[np.float32]
    packed_address: int
    stochastic: tuple[bool, ...]
    learned: tuple[bool, ...]
    keeps_entry: tuple[bool, ...]
    reads: tuple[int, ...]
    history: int
    remembers_x0: bool
    thresholded: bool
    scaled: bool
    times: tuple[int | float, ...]
    levels: tuple[tuple[float, float], ...]
    _derived: dict[Hashable, Any]

    def __init__(
        self,
        t: ArrayLike,
        *,
        alpha: ArrayLike | None = None,
        sigma: ArrayLike | None = None,
        init_noise_sigma: float = 1.0,
        box: tuple[ArrayLike, ArrayLike] | None = None,
        **columns: ArrayLike,
    ) -> None:
        times = real_array("t", t)
        if times.ndim != 1 or times.size == 0:
            raise ValueError(f"t must be a non-empty 1-D array, got shape {times.shape}")
        times = _as_times(times)
        if not np.isfinite(times).all():
            row = int(np.flatnonzero(~np.isfinite(times))[0])
            raise ValueError(f"t is {times[row]} in row {row}")
        if unknown := sorted(set(columns) - set(COLUMNS)):
            known = dict.fromkeys(("t", *_LEVELS, "init_noise_sigma", "box", *COLUMNS), "")
            raise ValueError(
                f"a table has no column {', '.join(unknown)}; its columns are {', '.join(COLUMNS)}"
                f"{meant_argument(unknown[0], known)}"
            )
        full = {"t": times}
        for name, default in COLUMNS.items():
            values = real_array(f"column {name}", columns.get(name, default)).astype(np.float64)
            if values.shape not in ((), times.shape):
                raise ValueError(f"column {name} must have shape {times.shape}, got {values.shape}")
            column = np.full(times.shape, values)
            if name == "limit" and not (column > LEAST).all():
                raise ValueError(f"column limit must be positive, got {column.min()}")
            if name != "limit" and not np.isfinite(column).all():
                row = int(np.flatnonzero(~np.isfinite(column))[0])
                raise ValueError(f"column {name} is {column[row]} in row {row} (t = {times[row]})")
            full[name] = column
        _check_columns(full)
        full["packed"] = _pack(full)
        levels = _levels(alpha, sigma, times.size)
        for array in (*full.values(), *levels.values()):
            if array is not None:
                array.setflags(write=False)
        self.__dict__.update(full, **levels)
        read = np.stack([full[name] != 0 for name in HISTORY])
        reads = tuple((read * [[1], [2], [3]]).max(axis=0).tolist())
        self.__dict__.update(
            init_noise_sigma=_checked_scale(init_noise_sigma),
            box=None if box is None else _checked_box(box, full["quantile"]),
            packed_address=full["packed"].ctypes.data,
            stochastic=tuple((full["s"] != 0).tolist()),
            learned=tuple((full["g1"] != 0).tolist()),
            keeps_entry=_kept(read),
            reads=reads,
            history=max(reads),
            remembers_x0=bool((full["hx"] == 0).all() and (full["h0"] == 1).all()),
            thresholded=bool(full["quantile"].any()),
            scaled=bool((full["e"] != 1).any()),
            times=tuple(times.tolist()),
            levels=_levels_after(levels["alpha"], levels["sigma"], times.size),
            _derived={},
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Table is immutable: cannot set {name!r}; use .replace({name}=...)")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self._given(),)

    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("t", *_LEVELS, "init_noise_sigma", "box", *COLUMNS)}

    def replace(self, **columns: ArrayLike) -> Table:
        """A new table with these columns in place of the old ones; `t`, `alpha`, `sigma` and so on too."""
        return _rebuild({**self._given(), **columns})

    def derived(self, key: Hashable, make: Callable[[Table], _T]) -> _T:
        """What `make` makes of this table at the first call with this key, kept as long as the table.

        Copies and pickles of the table begin without. Of two threads that come here at once, one's result stays.
        """
        kept: _T | None = self._derived.get(key)
        return self._derived.setdefault(key, make(self)) if kept is None else kept

    def __len__(self) -> int:
        return self.t.size

    def __iter__(self) -> Iterator[dict[str, float]]:
        """The rows in order, each a dict of its t and its coefficients."""
        names = ("t", *COLUMNS)
        for values in zip(*(getattr(self, name) for name in names), strict=True):
            yield dict(zip(names, (value.item() for value in values), strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Table):
            return NotImplemented
        mine, theirs = self._given(), other._given()
        return self.t.dtype == other.t.dtype and all(np.array_equal(mine[name], theirs[name]) for name in mine)

    def __hash__(self) -> int:
        return hash(((self.t + 0).tobytes(), (self.packed + 0.0).tobytes()))  # -0.0 equals 0.0

    def __repr__(self) -> str:
        shown = [name for name, default in COLUMNS.items() if (getattr(self, name) != default).any()]
        width = max(len(str(value)) for value in self.t.tolist())
        names = "".join(f"{name:>12}" for name in shown)
        lines = [
            f"Table of {len(self)} rows: {_formula(shown, boxed=self.box is not None)}",
            f"  k {'t':>{width + 1}}{names}",
        ]
        head = len(self) if len(self) <= 60 else 10
        for k in (*range(head), *range(max(head, len(self) - 10), len(self))):
            if k == len(self) - 10 and k > head:
                lines.append("  ...")
            cells = "".join(f"{getattr(self, name)[k]:12.5g}" for name in shown)
            lines.append(f"{k:>3} {self.t[k]:>{width + 1}}{cells}")
        return "\n".join(lines)


def _formula(shown: list[str], *, boxed: bool) -> str:
    """The rows' formula without the terms that no row has."""

    def terms(names: dict[str, str]) -> str:
        return " + ".join(f"{name} {operand}".rstrip() for name, operand in names.items() if name in shown) or "0"

    variance = f" exp({terms({'g0': '', 'g1': 'v'})})" if {"g0", "g1"} & {*shown} else ""
    to = "its box" if boxed else "limit"
    limited = ", thresholded" if "quantile" in shown else f", clamped to {to}" if "limit" in shown else ""
    model_input = "; the model is given e x" if "e" in shown else ""
    of_x0 = terms({"p": "x", "q": "m"})
    state = terms({"a": "x", "b": "x0", "c1": "h1", "c2": "h2", "c3": "h3", "d": "m", "s": f"{variance} z".lstrip()})
    of_entry = [*(["hx x"] if "hx" in shown else []), "h0 x0" if "h0" in shown else "x0"]
    entry = f"; h = {' + '.join(of_entry)}" if {"hx", "h0"} & {*shown} else ""
    return f"x0 = {of_x0}{limited}{entry}; x' = {state}{model_input}"


def _check_columns(columns: dict[str, NDArray]) -> None:
    quantile = columns["quantile"]
    if ((quantile < 0) | (quantile > 1)).any():
        raise ValueError(f"column quantile must lie in [0, 1], got {quantile}")
    if (columns["e"] == 0).any():
        raise ValueError("column e must not be 0: the model would be given nothing")
    for rows, name in enumerate(HISTORY, start=1):
        if columns[name][:rows].any():
            raise ValueError(f"column {name} must be 0 in the first {rows} row(s), where there is no such entry")


def _kept(read: NDArray[np.bool_]) -> tuple[bool, ...]:
    """Whether a later row reads a row's entry; `read` has a line for each of `HISTORY`."""
    rows = read.shape[1]
    later = [np.append(line[back:], np.zeros(min(back, rows), bool)) for back, line in enumerate(read, start=1)]
    return tuple(np.any(later, axis=0).tolist())


def _as_times(times: NDArray) -> NDArray:
    if not np.issubdtype(times.dtype, np.integer):
        with np.errstate(over="ignore"):
            return times.astype(np.float32)
    if times.max() > np.iinfo(np.int64).max:  # unsigned ones would wrap
        raise ValueError(f"t holds {times.max()}, beyond int64")
    return times.astype(np.int64)


def _checked_scale(init_noise_sigma: float) -> float:
    init_noise_sigma = real("init_noise_sigma", init_noise_sigma)
    if not 0 < init_noise_sigma < np.inf:
        raise ValueError(f"init_noise_sigma must be positive and finite, got {init_noise_sigma}")
    return float(init_noise_sigma)


def _checked_box(
    box: tuple[ArrayLike, ArrayLike], quantile: Float64Array
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    low, high = np.broadcast_arrays(*(one.astype(np.float32) for one in checked_bounds("box", box)))
    if quantile.any():
        raise ValueError("box and quantile limit x0 each in its own way: give one of them")
    copies = low.copy(), high.copy()
    for one in copies:
        one.setflags(write=False)
    return copies


def _levels(alpha: ArrayLike | None, sigma: ArrayLike | None, rows: int) -> dict[str, Float64Array | None]:
    if alpha is None and sigma is None:
        return {"alpha": None, "sigma": None}
    levels: dict[str, Float64Array | None] = {}
    for name, level in (("alpha", alpha), ("sigma", sigma)):
        values = real_array(name, np.nan if level is None else level).astype(np.float64)
        if values.shape != (rows + 1,) or not np.isfinite(values).all():
            raise ValueError(f"{name} must be {rows + 1} finite numbers, one more than rows, got shape {values.shape}")
        levels[name] = values
    return levels


def _levels_after(alpha: Float64Array | None, sigma: Float64Array | None, rows: int) -> tuple[tuple[float, float], ...]:
    if alpha is None or sigma is None:
        return ((np.nan, np.nan),) * rows
    return tuple(zip(alpha[1:].tolist(), sigma[1:].tolist(), strict=True))


def _pack(columns: dict[str, NDArray]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):
        c = columns
        limited = (c["limit"].astype(np.float32) < np.inf) | (c["quantile"].astype(np.float32) > 0)  # as kernels ask
        folded = {
            "p": without_rounding(c["hx"], c["h0"] * c["p"]),
            "q": c["h0"] * c["q"],
            "a": c["a"] + c["b"] * c["p"],
            "d": c["b"] * c["q"] + c["d"],
            "hx": 0.0,
            "h0": 1.0,
        }
        computed = {
            "s": c["s"] * np.exp(c["g0"]),
            "g1": c["g1"] / np.log(2),
            "next_e": np.append(c["e"][1:], 1.0),
            "unused": np.zeros(c["t"].shape),
        }
        computed |= {name: np.where(limited, c[name], value) for name, value in folded.items()}
        values = {**columns, **computed}
        packed = np.stack([values[name] for name in ROW], axis=1).astype(np.float32)
    if not np.isfinite(np.delete(packed, ROW.index("limit"), axis=1)).all():
        raise ValueError("a coefficient of the table overflows float32")
    return packed


def without_rounding(one: ArrayLike, other: ArrayLike) -> Float64Array:
    """one + other, 0 where they cancel but for their own rounding: epsilon of a model of epsilon has nothing of x."""
    one, total = np.asarray(one), np.add(one, other)
    return np.where(np.abs(total) <= 8 * np.finfo(np.float64).eps * np.abs(one), 0.0, total)


def _rebuild(columns: dict[str, Any]) -> Table:
    return Table(**columns)
