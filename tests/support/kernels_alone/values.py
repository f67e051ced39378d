"""Golden values of the CPU kernels for a program without Python, from references in float64 and in whole numbers.

A case is a line with its kind and its name, a line for each array, its name first, and an empty line. Floats are
decimal, 16-bit floats the integers of their bits. Beside each result stands the largest error that float32 may leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastsample import DDPM, Schedule, Table
from fastsample.ops.dtypes import DTYPE_CODES
from fastsample.ops.lora.adapters import LowRank
from fastsample.ops.noise import STEP
from fastsample.ops.noise.reference import randn_reference
from fastsample.ops.posterior.rows import rows_of
from fastsample.tables import ROW
from support.formula import UNIT, expected
from support.lora_formula import Problem, exact
from support.paths import GOLDEN
from support.philox import KNOWN_ANSWERS
from support.splitmix import key, signed
from support.step_modes import LAST, MODES, TIMES

FILE = GOLDEN / "kernels.txt"
_HEAD = "# Written by `cd tests && python -m support.kernels_alone`, from the references.\n\n"
_DIGITS = {"float32": 9, "float64": 12}
_SHAPE = (2, 2, 3)


def text() -> str:
    """The whole file."""
    return _HEAD + "".join([*_philox(), _keys(), *_normals(), *_steps(), *_loras()])


def _case(kind: str, name: str, **arrays: ArrayLike | Tensor) -> str:
    lines = [f"{array} {_values(values)}".rstrip() for array, values in arrays.items()]
    return "\n".join([f"{kind} {name}", *lines, "\n"])


def _values(values: ArrayLike | Tensor) -> str:
    if isinstance(values, Tensor) and values.dtype in (torch.float16, torch.bfloat16):
        values = values.view(torch.int16).int() & 0xFFFF
    flat = np.asarray(values).reshape(-1)
    digits = _DIGITS.get(flat.dtype.name)
    return " ".join(str(value) if digits is None else f"{value:.{digits}g}" for value in flat.tolist())


def _drawn(shape: Sequence[int], stream: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Operands: normals that are the same with every torch."""
    return (scale * randn_reference((1, *shape), signed([key(0, 0)]), 0, stream)[0]).to(dtype)


def _philox() -> Iterator[str]:
    for known in KNOWN_ANSWERS:
        counter, words, out = known.values
        yield _case("philox", str(known.id), counter=counter, key=words, out=out)


def _unsigned(words: Iterable[int]) -> NDArray[np.uint64]:
    return np.array([*words], np.uint64)


def _keys() -> str:
    out = _unsigned(key(-3, 2**32 + i) for i in range(4))
    return _case("keys", "near-the-end", seed=_unsigned([2**64 - 3]), index=2**32, out=out)


def _normals() -> Iterator[str]:
    """At the ends of blocks, and in a second sample, which another thread draws."""
    for size, places in ((30, range(60)), (40001, [0, 2047, 2048, 20000, 40000, 40001, 60000, 80001])):
        keys = [key(7, 0), key(7, 1)]
        bits = randn_reference((2, size), signed(keys), 5, STEP).view(torch.int32).reshape(-1)[list(places)]
        drawn = {"keys": _unsigned(keys), "step": 5, "stream": STEP, "size": size, "places": list(places)}
        yield _case("normals", f"{size}-each", **drawn, bits=bits.long() & 0xFFFFFFFF)


class _Mode(NamedTuple):
    """A row of a mode of step_modes, with the output's dtype; `draws` noise in the pass or is given it."""

    name: str
    dtype: torch.dtype = torch.float32
    row: int = LAST
    draws: bool = False


_MODES = (
    _Mode("folded-far"),
    _Mode("history-noise", draws=True),
    _Mode("history-of-epsilon"),
    _Mode("history-of-epsilon-clamped", torch.bfloat16),
    _Mode("learned-clamped", torch.bfloat16),
    _Mode("guided-each", torch.float16),
    _Mode("rescaled-each-learned", draws=True),
    _Mode("thresholded-max", torch.float16),
    _Mode("everything", torch.bfloat16, row=LAST - 1),
    _Mode("everything", torch.float16, draws=True),
)


def _steps() -> Iterator[str]:
    for mode in _MODES:
        columns, learned, weights, rescale = MODES[mode.name]
        guidance = [7.5, -0.5] if weights == "each" else weights
        name = f"{mode.name}-{str(mode.dtype).removeprefix('torch.')}"
        yield _step(name, Table(TIMES, **columns), mode, learned, guidance, rescale)
    # A posterior's mean is the step without its noise.
    table = rows_of(DDPM(Schedule.linear(100), steps=10, variance="learned_range").table).noise_free
    yield _step("posterior-mean", table, _Mode("", row=4), True, None, 0.0)


def _step(name: str, table: Table, mode: _Mode, learned: bool, guidance: Sequence[float] | None, rescale: float) -> str:
    batch, channels, *rest = _SHAPE
    output = (batch * (1 if guidance is None else 2), channels * (2 if learned else 1), *rest)
    x, m, *history = _drawn(_SHAPE, 10), _drawn(output, 11, mode.dtype), *(_drawn(_SHAPE, i) for i in (12, 13, 15))
    keys = [key(3, 8), key(3, 9)] if mode.draws else []
    given = [] if mode.draws else _drawn(_SHAPE, 14)
    z = randn_reference(_SHAPE, signed(keys), mode.row, STEP) if mode.draws else given
    want = expected(x, m, table, mode.row, z=z, history=history, guidance=guidance, rescale=rescale)
    scale = table.packed[mode.row][ROW.index("next_e")]
    input_error = abs(scale) * want.state_error + (UNIT + _rounding(mode.dtype)) * abs(want.model_input)
    operands = {"rows": table.packed, "row": mode.row, "batch": batch, "dtype": DTYPE_CODES[mode.dtype], "x": x, "m": m}
    options = {"guidance": guidance or [], "rescale": rescale, "thresholds": int(table.thresholded)}
    others = {"h1": history[0], "h2": history[1], "h3": history[2], "keys": _unsigned(keys), "z": given}
    results = {"out": want.state, "entry": want.entry, "input": want.model_input}
    errors = {"out_error": want.state_error, "entry_error": want.entry_error, "input_error": input_error}
    return _case("step", name, **operands, **options, **others, **results, **errors)


def _loras() -> Iterator[str]:
    """One group of adapters, which the last linear is left out of; the deeper product is cut into blocks."""
    for dtype, depth, columns in (
        (torch.float32, 200, (2, 1)),
        (torch.float32, 7, (35, 4)),
        (torch.float16, 17, (18, 5)),
        (torch.bfloat16, 17, (18, 5)),
    ):
        weights = tuple(_drawn((n, depth), 20 + i, dtype, depth**-0.5) for i, n in enumerate(columns))
        biases = tuple(_drawn((n,), 22 + i, dtype) for i, n in enumerate(columns))
        down, up = _drawn((2, depth), 24, dtype, depth**-0.5), _drawn((columns[0], 2), 25, dtype)
        group = (LowRank(down, up, torch.tensor([0.7, 0.4])), None)
        name = f"{depth}-deep-{str(dtype).removeprefix('torch.')}"
        yield _lora(name, Problem(_drawn((3, depth), 26, dtype), weights, biases, (group,)), [0, -1, 0])


def _lora(name: str, p: Problem, group_of: Sequence[int]) -> str:
    samples = [(p.x[i : i + 1], group) for i, group in enumerate(group_of)]
    results = [exact(p, x, group) for x, group in samples]
    errors = [_errors(p, x, group) for x, group in samples]
    linears = range(len(p.weights))
    [low_rank] = [one for one in p.groups[0] if one is not None]
    return _case(
        "lora",
        name,
        dtype=DTYPE_CODES[p.x.dtype],
        depth=p.x.shape[1],
        columns=[len(weight) for weight in p.weights],
        x=p.x,
        weights=torch.cat(p.weights),
        group_of=group_of,
        bias=torch.cat([bias.float() for bias in p.biases if bias is not None]),
        ranks=[len(low_rank.down), 0],
        **low_rank._asdict(),
        y=torch.cat([of[i] for i in linears for of in results], dim=1),
        y_error=torch.cat([of[i] for i in linears for of in errors], dim=1),
    )


def _errors(p: Problem, x: Tensor, group: int) -> list[Tensor]:
    """The largest errors of each linear's result: a sum of n terms is off by n units of their magnitudes, in any order.

    t, whose own sum enters those of y, and y are rounded to the dtype.
    """
    own, errors = _rounding(x.dtype), []
    for i, (weight, bias) in enumerate(zip(p.weights, p.biases, strict=True)):
        assert bias is not None
        magnitude = abs(x.double()) @ abs(weight.double()).T + abs(bias.double())
        low_rank, of_adapter, terms = p.groups[0][i] if group >= 0 else None, torch.zeros(()), len(weight[0]) + 2
        if low_rank is not None:
            t = abs(x.double()) @ abs(low_rank.down.double()).T * low_rank.scale.double()
            of_adapter, terms = t @ abs(low_rank.up.double()).T, 2 * terms + len(low_rank.down)
        both = magnitude + of_adapter
        errors.append(terms * UNIT * both + own * (of_adapter + both))
    return errors


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2
