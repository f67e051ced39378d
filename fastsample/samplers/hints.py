"""Messages for calls that are likely mistakes: unknown arguments, rows that amplify errors, starts without noise."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from typing_extensions import Never

from fastsample.caller import warn
from fastsample.hints import no_argument, no_attribute_of_sampler, of_diffusers
from fastsample.loop.options import Options
from fastsample.schedule import Schedule
from fastsample.tables import Table
from fastsample.times.automatic import AUTO

# Four steps from half of it have several times the Frechet distance of the best start, on the cosine and on the linear
# schedule: benchmarks/starts.py.
LEAST_RATIO = 5.0

FUNCTIONS: dict[type, str] = {}  # of each sampler its function

_OF_MODEL = "the model's own keywords go into model_kwargs= (fastsample.Options lists what a call takes)"


def no_option(kind: type, name: str) -> TypeError:
    """The error to raise for an argument that the call of a sampler of this class does not have."""
    made = f"{FUNCTIONS[kind]}(...) or {kind.__name__}(...)" if kind in FUNCTIONS else f"{kind.__name__}(...)"
    arguments = dict.fromkeys(_fields(kind), made) | _of_call()
    return TypeError(no_argument(kind.__name__, name, arguments, others=_of_others(), otherwise=_OF_MODEL))


class _OfSchedulers:
    """A class method of diffusers' schedulers, which samplers do not have. (@private: nor does the reference.)"""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, sampler: object, kind: type) -> Never:
        raise AttributeError(no_attribute_of_sampler(kind, self._name))


class NoScheduler:
    """What a sampler answers that is made with the words of another library, or taken for a scheduler of diffusers."""

    if not TYPE_CHECKING:  # to whom these would tell that anything goes
        from_config, from_pretrained = _OfSchedulers(), _OfSchedulers()

        def __new__(cls, *given, **named):
            _check_fields(cls, named)
            return super().__new__(cls)

        def __getattr__(self, name):
            raise AttributeError(no_attribute_of_sampler(type(self), name), name=name, obj=self)


def _check_fields(kind: type, names: Iterable[str]) -> None:
    """Raises TypeError where the class of a sampler has no such field."""
    taken = _parameters(kind)
    if taken is None or all(name in taken for name in names):
        return
    unknown = next(name for name in names if name not in taken)
    arguments = dict.fromkeys(_of_call(), "the sampler's call") | dict.fromkeys(taken, "")
    raise TypeError(no_argument(kind.__name__, unknown, arguments, others=_of_others()))


def check_not_compiling(kind: type) -> None:
    """Raises ValueError under torch.compile, which cannot look into what makes a sampler."""
    if torch.compiler.is_compiling():
        raise ValueError(
            f"compiled, a run needs a sampler that was made before: sampler = fastsample.{kind.__name__}(...), and "
            "sampler(model, x) in the function that is compiled"
        )


def not_a_sampler(value: object) -> TypeError:
    """The error to raise for what stands in the place of a sampler."""
    got = f"{type(value).__name__}{of_diffusers(value)}"
    return TypeError(f"sampler must be one of fastsample's, such as fastsample.DDIM(schedule), got {got}")


def _of_call() -> dict[str, str]:
    return dict.fromkeys(("model", "x", *Options.__annotations__), "")


def _of_others() -> dict[str, str]:
    """The fields of all samplers, each with the functions that have it."""
    have: dict[str, list[str]] = {}
    for kind, function in FUNCTIONS.items():
        if kind.__module__.startswith("fastsample."):
            for name in _fields(kind):
                have.setdefault(name, []).append(f"fastsample.{function}")
    return {name: ", ".join(functions[:3]) + (" and others" * (len(functions) > 3)) for name, functions in have.items()}


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


@functools.cache
def _parameters(kind: type) -> frozenset[str] | None:
    """What a class is made with, by name; None where that is anything."""
    parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    anything = any(one.kind is one.VAR_KEYWORD for one in parameters)
    return None if anything else frozenset(one.name for one in parameters)


def warn_of_amplified_errors(table: Table) -> bool:
    """Warns where a row would multiply a small error of the model by much; returns whether it warned."""
    # A limit keeps what the error does to x0 to the order of 1, but not what the row makes of that (a Heun corrector
    # next to pure noise).
    unlimited = np.isinf(table.limit) & (table.quantile == 0)
    limited = np.abs(table.b) * np.minimum(np.abs(table.q), 1)
    grows = np.where(unlimited, np.abs(table.b * table.q + table.d) / 20, limited / 5)
    worst = int(np.argmax(grows))
    if grows[worst] <= 1:
        return False
    if unlimited[worst]:
        factor, remedy = 20 * grows[worst], "give clip= (1.0 for images in [-1, 1]), or leave that timestep out"
    else:
        factor, remedy = 5 * grows[worst], "leave that timestep out, or for heun take timesteps='karras'"
    warn(f"the row at t = {table.times[worst]} multiplies the model's error by {factor:.0f}: {remedy}")
    return True


def low_start(table: Table, schedule: Schedule | None, timesteps: object) -> str | None:
    """What to tell of a run from drawn noise whose first level holds much of the sample, None for any other.

    x_T ~ N(0, 1) lacks that share, alpha x0. Where even the schedule's noisiest level is like that nothing can be
    chosen, and of one with more sample than noise fastsample.loop.start warns for every table. The default goes as high
    as it can.
    """
    if table.alpha is None or table.sigma is None or timesteps == AUTO:
        return None
    alpha, sigma = float(table.alpha[0]), float(table.sigma[0])
    if sigma < alpha or sigma >= LEAST_RATIO * alpha:
        return None
    least = 0.0 if schedule is None else float(schedule.alphas_cumprod[-1])
    if least > 0 and (1 - least) / least < (1.5 * sigma / alpha) ** 2:
        return None
    return (
        f"x_T is drawn as pure noise, but the first row (t = {table.times[0]:g}) takes a state at the level alpha = "
        f"{alpha:.3g}, sigma = {sigma:.3g}, whose share of the sample it lacks: take timesteps='auto' or a noisier "
        "first timestep, or give as x a clean sample with strength="
    )
