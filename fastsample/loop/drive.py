"""A loop run to its end, with what the caller wants to see on the way; nothing is lost where that fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsample.checks import check_has_values
from fastsample.hints import check_takes
from fastsample.loop.loop import Loop
from fastsample.loop.options import Step, Stop
from fastsample.model import decoder_dtype, unwrapped
from fastsample.ops.noise.keys import Index, Seed


@dataclass(slots=True)
class Hooks:
    """What a call does beside sampling: see fastsample.Options."""

    callback: Callable[[Step], object] | None = None
    progress: bool = False
    decode: Callable[[Tensor], Any] | None = None

    def __post_init__(self) -> None:
        for name in ("callback", "decode"):
            function = getattr(self, name)
            if not (function is None or callable(function)):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        if self.callback is not None:
            check_takes("callback", self.callback, "callback(step)", "a fastsample.Step after every row")
        if self.decode is not None:
            check_takes("decode", self.decode, "decode(sample)", "the sample")


_HOOKS = frozenset({"callback", "progress"})
_NO_HOOKS = Hooks()


def hooks_of(options: Mapping[str, Any], decode: Callable[[Tensor], Any] | None = None) -> Hooks:
    """The hooks among these options, whose other names do not matter, and `decode`.

    Raises:
        TypeError: where a callback or decode cannot be called.
    """
    names = _HOOKS & options.keys()
    if not names and decode is None:
        return _NO_HOOKS
    return Hooks(**{name: options[name] for name in names}, decode=decode)


def drive(
    loop: Loop, x: Tensor | Sequence[int], seed: Seed | None, index: Index, out: Tensor | None, hooks: Hooks
) -> Any:
    """The sample, decoded where asked for. An exception on the way carries what there is of it as `sample`."""
    if out is not None:
        loop.check_out(out)
    with torch.set_grad_enabled(loop.differentiable):
        loop.start(x, seed, index)
        try:
            _run(loop, hooks)
            result = loop.result() if out is None else out.copy_(loop.state)
            decoded = result if hooks.decode is None else _decoded(hooks.decode, result)
        except BaseException as error:
            carry_sample(error, loop)
            raise
        loop.close()
        return decoded


def _decoded(decode: Callable[[Tensor], Any], result: Tensor) -> Any:
    dtype = decoder_dtype(decode)
    return unwrapped(decode(result if dtype is None else result.to(dtype)))


def _run(loop: Loop, hooks: Hooks) -> None:
    callback = hooks.callback
    if callback is None and not hooks.progress:
        deque(loop.rows(), maxlen=0)  # runs them all, faster than a loop does
        return
    with _progress_bar(len(loop.schedule)) if hooks.progress else nullcontext() as bar:
        for step in loop.rows():
            stopped = callback is not None and step is not None and _stops(callback, step, loop)
            if bar is not None:
                bar.update()
            if stopped:
                return


def _stops(callback: Callable[[Step], object], step: Step, loop: Loop) -> bool:
    """Shows a row; whether the run ends there, with the state as the result."""
    x0 = step.x0
    try:
        callback(step)
    except Stop as stop:
        loop.check_stopped(step, x0)
        if stop.sample is not None:
            if not step.x.is_meta:
                check_has_values("sample of fastsample.Stop", stop.sample)
            if stop.sample.shape != step.x.shape:
                got, wanted = tuple(stop.sample.shape), tuple(step.x.shape)
                raise ValueError(f"the sample of fastsample.Stop must have shape {wanted}, got {got}") from None
            step.x.copy_(stop.sample)
        return True
    return False


def shown(loop: Loop) -> Iterator[Step]:
    """The steps of a loop that has been started; between them the caller's own gradient mode is in force."""
    rows = loop.rows()
    while True:
        with torch.set_grad_enabled(loop.differentiable):
            try:
                step = next(rows, None)
            except BaseException as error:
                carry_sample(error, loop)
                raise
        if step is None:
            return
        yield step


def carry_sample(error: BaseException, loop: Loop) -> None:
    """Gives the exception the state as it is, so that what a run has come to is not lost."""
    # Those of extension types may take no attributes, others may refuse them; and memory may be what has run out.
    with suppress(Exception):
        error.sample = loop.state.detach().clone()  # type: ignore[attr-defined]


def _progress_bar(total: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total)
