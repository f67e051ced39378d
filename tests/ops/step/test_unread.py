"""An operand whose coefficient is 0 is not read: a NaN in it is harmless, on every backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastsample import DDPM, Schedule, Table
from fastsample.ops import likelihood, posterior, step
from support.devices import Target
from support.levels import LEVELS, at_level

B, C, SIZE = 2, 2, 40
NAN = float("nan")
USUAL = {"p": 0.9, "q": -0.4, "a": 0.3, "b": 0.6, "c1": 0.2, "c2": 0.1, "c3": -0.3, "d": 0.25, "s": 0.5}
HISTORY = ("h1", "h2", "h3")
LIMITS = {"free": {}, "clamped": {"limit": 1.5}, "thresholded": {"limit": 2.0, "quantile": 0.9}}


class Unread(NamedTuple):
    """Coefficients other than the usual, and the operands that x' (and the entry, unless it reads them) leaves out."""

    changed: dict[str, float]
    operands: str
    entry_reads: bool = False


UNREAD = {
    "x": Unread({"p": 0.0, "a": 0.0, "h0": -0.5}, "x"),
    "m": Unread({"q": 0.0, "d": 0.0, "hx": 0.5}, "m u"),
    "m but in x0": Unread({"b": 0.0, "d": 0.0}, "m u", entry_reads=True),
    "x0": Unread({"b": 0.0, "d": 0.0, "hx": 0.5, "h0": 0.0}, "m u"),
    "h1": Unread({"c1": 0.0}, "h1"),
    "h2": Unread({"c2": 0.0}, "h2"),
    "h3": Unread({"c3": 0.0}, "h3"),
    "noise": Unread({"s": 0.0}, "z"),
    "all but noise": Unread(dict.fromkeys(("p", "q", "a", "d", "c1", "c2", "c3"), 0.0), "x m u h1 h2 h3"),
}
FOLDED = Unread({"q": -0.5, "b": 0.5, "d": 0.25}, "m u", entry_reads=True)  # b q + d = 0
# hx + h0 p = 0, but for its rounding
EPSILON = Unread({"p": 1.25, "q": -0.75, "a": -1.25, "b": 1.0, "hx": 1 / 0.6, "h0": -0.8 / 0.6}, "x")


def table_of(columns: dict[str, float]) -> Table:
    """Four rows, the last with these coefficients; the others are idle."""
    return Table([9, 7, 5, 0], **{name: [float(name == "limit")] * 3 + [one] for name, one in columns.items()})


def tensors(device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(B, C, SIZE, generator=generator).to(device) for name in ("x", "m", "u", *HISTORY, "z")}


def stepped(
    target: Target, table: Table, t: dict[str, Tensor], dtype: torch.dtype, weights: list[float] | None, rescale: float,
    row: int | Tensor = 3,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(x', the next input, the entry)"""
    m = (t["m"] if weights is None else torch.cat([t["u"], t["m"]])).to(dtype)
    entry, after = torch.empty_like(t["x"]), torch.empty(2 * B, C, SIZE, dtype=dtype, device=target.device)
    options: dict[str, Any] = {} if weights is None else {"guidance": weights, "guidance_rescale": rescale}
    x = step(
        *(t["x"], m, table, row),
        noise=t["z"],
        history=[t[name] for name in HISTORY],
        x0_out=entry,
        input_out=after,
        backend=target.backend,
        **options,
    )
    return x, after, entry


def with_nan(t: dict[str, Tensor], names: str, samples: slice = slice(None)) -> dict[str, Tensor]:
    changed = {name: one.clone() for name, one in t.items()}
    for name in names.split():
        changed[name][samples] = NAN
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("guided", ["unguided", "guided", "rescaled"])
def test_step(any_backend: Target, guided: str, limit: str, dtype: torch.dtype) -> None:
    weights, rescale = None if guided == "unguided" else [3.0, 0.5], 0.7 if guided == "rescaled" else 0.0
    cases = {**UNREAD, **({"m folds away": FOLDED, "x folds away": EPSILON} if limit == "free" else {})}
    t = tensors(any_backend.device)
    for name, case in cases.items():
        table = table_of({**USUAL, **LIMITS[limit], **case.changed})
        want = stepped(any_backend, table, t, dtype, weights, rescale)
        got = stepped(any_backend, table, with_nan(t, case.operands), dtype, weights, rescale)
        for one, other in list(zip(got, want, strict=True))[: 2 if case.entry_reads else 3]:
            assert torch.equal(one, other), name


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_step_at_every_level(isa: str, dtype: torch.dtype) -> None:
    with at_level(isa):
        for limit in LIMITS:
            test_step(Target("cpu", "cpu"), "rescaled", limit, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", LIMITS)
def test_a_weight_of_1_or_0_leaves_one_half(any_backend: Target, limit: str, dtype: torch.dtype) -> None:
    table, t = table_of({**USUAL, **LIMITS[limit]}), tensors(any_backend.device)
    got = stepped(any_backend, table, with_nan(with_nan(t, "u", slice(1)), "m", slice(1, 2)), dtype, [1.0, 0.0], 0.0)
    halves = {**t, "m": torch.cat([t["m"][:1], t["u"][1:]])}
    want = stepped(any_backend, table, halves, dtype, None, 0.0)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_the_derivative_in_a_weight_of_1_or_0() -> None:
    t = {name: one.double() for name, one in tensors("cpu").items()}
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    table = table_of({"d": 0.25})
    step(t["x"], torch.cat([t["u"], t["m"]]), table, 3, guidance=weights, backend="reference").sum().backward()
    torch.testing.assert_close(weights.grad, 0.25 * (t["m"] - t["u"]).sum(dim=(1, 2)))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_idle_samples_that_hold_nan(any_backend: Target, limit: str, rescale: float) -> None:
    table, t = table_of({**USUAL, **LIMITS[limit]}), tensors(any_backend.device)
    rows = torch.tensor([3, 0])
    want = stepped(any_backend, table, t, torch.float32, [3.0, 0.5], rescale, rows)
    got = stepped(
        any_backend, table, with_nan(t, "x m u h1 h2 h3 z", slice(1, 2)), torch.float32, [3.0, 0.5], rescale, rows
    )
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_a_variance_that_a_posterior_does_not_read(any_backend: Target) -> None:
    table = Table([5, 0], a=0.5, s=[0.3, 0.2], g0=-0.5, g1=[0.0, 0.4])
    x, v = tensors(any_backend.device)["x"], tensors(any_backend.device)["m"]
    rows = torch.tensor([0, 1])
    want, got = (
        posterior(x, torch.cat([x, half], dim=1), table, rows, backend=any_backend.backend)
        for half in (v, with_nan({"v": v}, "v", slice(1))["v"])
    )
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_a_state_that_a_likelihood_does_not_read(any_backend: Target) -> None:
    if any_backend.backend not in ("reference", "triton"):
        pytest.skip("likelihood has no kernel of this backend")
    table = DDPM(Schedule.linear(), prediction="x0").table
    data, x = tensors(any_backend.device)["x"].clamp(-1, 1), tensors(any_backend.device)["m"]
    want, got = (
        likelihood(data, state, 0.9 * data, table, 500, backend=any_backend.backend)
        for state in (x, torch.full_like(x, NAN))
    )
    assert torch.equal(got, want)
