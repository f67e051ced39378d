"""What a run has come to survives a decode, callback, out, model or Ctrl-C that ends it: the exception carries it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample import DDIM, DDPM, Schedule, Step, ddim, interpolate

SHAPE = (2, 3, 4)
SAMPLER = DDIM(Schedule.linear(), steps=4, eta=1.0)
WANT = SAMPLER(lambda x, t: x * 0.5, SHAPE, seed=1)


class LostError(Exception):
    pass


def half(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.5


def fails(*_: object) -> Any:
    raise LostError("the end")


def interrupts(*_: object) -> Any:
    raise KeyboardInterrupt


def after(rows: int, error: Callable[..., Any]) -> Callable[[Step], None]:
    def callback(step: Step) -> None:
        if step.index == rows - 1:
            error()

    return callback


def states() -> list[Tensor]:
    return [step.x.clone() for step in SAMPLER.iterate(half, SHAPE, seed=1)]


ENDS: dict[str, tuple[dict[str, Any], type[BaseException], int]] = {
    "decode": ({"decode": fails}, LostError, 4),
    "decode-interrupted": ({"decode": interrupts}, KeyboardInterrupt, 4),
    "callback": ({"callback": after(2, fails)}, LostError, 2),
    "last-callback": ({"callback": after(4, fails)}, LostError, 4),
    "callback-interrupted": ({"callback": after(3, interrupts)}, KeyboardInterrupt, 3),
}


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("name", ENDS)
def test_the_exception_carries_the_sample(name: str, prepared: bool) -> None:
    options, error, rows = ENDS[name]
    with pytest.raises(error) as caught:
        if prepared:
            SAMPLER.prepare(half, SHAPE, **options)(seed=1)
        else:
            SAMPLER(half, SHAPE, seed=1, **options)
    assert torch.equal(caught.value.sample, states()[rows - 1])  # type: ignore[attr-defined]
    SAMPLER(half, SHAPE, seed=2)
    assert torch.equal(caught.value.sample, states()[rows - 1]), "it is no buffer of later runs"  # type: ignore[attr-defined]


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("iterates", [False, True], ids=["call", "iterate"])
def test_a_model_that_fails(iterates: bool, rows: int) -> None:
    calls = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > rows:
            raise KeyboardInterrupt
        return x * 0.5

    def run() -> None:
        if iterates:
            list(SAMPLER.iterate(model, SHAPE, seed=1))
        else:
            SAMPLER(model, SHAPE, seed=1)

    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    seen: list[Tensor] = []
    first = next(iter(SAMPLER.iterate(lambda x, t: seen.append(x.clone()) or x * 0.5, SHAPE, seed=1)))  # type: ignore[func-returns-value]
    del first
    want = seen[0] if rows == 0 else states()[rows - 1]
    assert torch.equal(caught.value.sample, want)  # type: ignore[attr-defined]


def test_out_has_the_sample_where_decode_fails() -> None:
    out = torch.zeros(SHAPE)
    with pytest.raises(LostError) as caught:
        SAMPLER(half, SHAPE, seed=1, out=out, decode=fails)
    assert torch.equal(out, WANT)
    assert torch.equal(caught.value.sample, WANT)  # type: ignore[attr-defined]


def test_an_out_that_cannot_be_written_is_refused_first() -> None:
    calls = []

    def counting(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return x * 0.5

    with torch.inference_mode():
        inference = torch.zeros(SHAPE)
    for out in (torch.zeros(2, 1, 1).expand(SHAPE), inference, torch.zeros(1), torch.zeros(SHAPE).double()):
        with pytest.raises((ValueError, TypeError), match="out"):
            SAMPLER(counting, SHAPE, seed=1, out=out)
    assert not calls


def test_with_gradients() -> None:
    x = torch.zeros(SHAPE, requires_grad=True)
    with pytest.raises(LostError) as caught:
        SAMPLER(half, x, seed=1, decode=fails)
    assert torch.equal(caught.value.sample, SAMPLER(half, x, seed=1).detach())  # type: ignore[attr-defined]


def test_of_interpolate() -> None:
    a, b = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)
    with pytest.raises(LostError) as caught:
        interpolate(half, a, b, 3, sampler=SAMPLER, seed=1, decode=fails)
    assert torch.equal(caught.value.sample, interpolate(half, a, b, 3, sampler=SAMPLER, seed=1))  # type: ignore[attr-defined]


def test_an_exception_that_takes_no_attributes_is_raised_as_it_is() -> None:
    class BareError(Exception):
        __slots__ = ()

        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    def refuses(x: Tensor) -> None:
        raise BareError

    with pytest.raises(BareError):
        SAMPLER(half, SHAPE, seed=1, decode=refuses)


class Vae(nn.Module):
    """As diffusers' AutoencoderKL is called."""

    scaling_factor = 0.18

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 2, 1).to(dtype)

    def decode(self, z: Tensor) -> Any:
        return (self.conv(z),)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_documented_line_runs_with_a_vae_of_any_dtype(dtype: torch.dtype) -> None:
    vae, sampler = Vae(dtype).eval(), DDPM(Schedule.linear(), steps=2)
    want = vae.decode(sampler(half, SHAPE, seed=1).to(dtype) / vae.scaling_factor)[0]
    got = sampler(half, SHAPE, seed=1, decode=lambda x: vae.decode(x / vae.scaling_factor))
    assert torch.equal(got, want)
    assert torch.equal(
        ddim(half, SHAPE, seed=1, steps=2, decode=vae.decode),
        vae.decode(ddim(half, SHAPE, seed=1, steps=2).to(dtype))[0],
    )


class FullError(Exception):
    """Takes no attributes, and says so by an error of another kind."""

    def __setattr__(self, name: str, value: object) -> None:
        raise OSError(name)


@pytest.mark.parametrize("during", ["decode", "iterate"])
def test_nothing_that_fails_while_the_sample_is_attached_hides_the_error(during: str) -> None:
    def refuses(*_: object) -> Any:
        raise FullError

    with pytest.raises(FullError):
        if during == "decode":
            SAMPLER(half, SHAPE, seed=1, decode=refuses)
        else:
            list(SAMPLER.iterate(refuses, SHAPE, seed=1))
