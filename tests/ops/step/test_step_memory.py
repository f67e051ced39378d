"""Which memory ops.step reads and writes: strides, overlaps, views, and what autograd is told of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsample import Table, ops
from support.formula import normal
from support.step_modes import KINDS


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return normal(shape, 1), normal(shape, 2, dtype), normal(shape, 3)


@pytest.mark.parametrize("strided", ["x", "model_output", "noise", "out", "x0_out", "input_out"])
def test_strided_tensors_work(backend: str, strided: str) -> None:
    x, m, z = inputs((2, 3, 6, 5))
    table = Table([0], **KINDS["all-terms"])
    tensors = dict(
        x=x, model_output=m, noise=z, out=x.clone(), x0_out=torch.zeros_like(x), input_out=torch.zeros_like(x)
    )
    packed = {name: tensor.clone() for name, tensor in tensors.items()}
    ops.step(table=table, row=0, backend=backend, **packed)
    other = {name: tensor.clone() for name, tensor in tensors.items()}
    other[strided] = other[strided].to(memory_format=torch.channels_last)
    assert not other[strided].is_contiguous()
    ops.step(table=table, row=0, backend=backend, **other)
    for name in ("out", "x0_out", "input_out"):
        assert torch.equal(other[name], packed[name]), name


def test_outputs_must_not_cross_inputs(backend: str) -> None:
    x, m, z = inputs((2, 3, 4))
    buffer = torch.zeros(3, 3, 4)
    table = Table([0], p=1.0, q=1.0, b=1.0, d=1.0, limit=1.0)
    crossing = [
        dict(x=x, model_output=m, x0_out=x),
        dict(x=x, model_output=m, x0_out=m),
        dict(x=x, model_output=m, out=z, x0_out=z),
        dict(x=x, model_output=m, out=z, input_out=z),
        dict(x=buffer[:2], model_output=m, out=buffer[1:]),
        dict(x=x, model_output=m, out=m.view(2, 4, 3).transpose(1, 2)),
    ]
    for tensors in crossing:
        with pytest.raises(ValueError, match="overlaps"):
            ops.step(table=table, row=0, backend=backend, **tensors)
    want = ops.step(x, m, table, 0, backend=backend)
    assert torch.equal(ops.step(x, m, table, 0, out=m, backend=backend), want), "exactly the model's output is fine"


def test_autograd_knows_of_what_is_written(backend: str) -> None:
    x, m, _ = inputs((2, 3))
    weight = torch.ones(3, 1, requires_grad=True)
    product = (x @ weight).sum()
    ops.step(x, m, Table([0], a=2.0), 0, out=x, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(ValueError, match="requires gradients"):
        ops.step(x, m, Table([0], a=2.0), 0, out=weight.expand(3, 3)[:2] * 1.0, backend="reference")
    z = torch.zeros(2, 3, requires_grad=True)
    assert ops.step(x, m, Table([0], a=1.0, s=2.0), 0, noise=z).requires_grad


def test_inference_tensors(backend: str) -> None:
    with torch.inference_mode():
        x = ops.randn((2, 9), seed=0, backend=backend)
        assert x.is_inference()
        ops.randn((2, 9), seed=0, out=x, backend=backend)
        ops.step(x, x.clone(), Table([0], a=2.0), 0, out=x, backend=backend)
    assert torch.equal(x, 2 * ops.randn((2, 9), seed=0, backend=backend))


@pytest.mark.parametrize("packed", [False, True], ids=["strided", "packed"])
def test_negated_views(backend: str, packed: bool) -> None:
    def negated(value: float) -> Tensor:
        plain = torch.full((2, 5), -value)
        view = plain._neg_view() if packed else torch.complex(plain, plain).conj().imag
        assert view.is_neg() and view.is_contiguous() == packed
        return view

    table = Table([1, 0], a=1.0, q=1.0, b=10.0, c1=[0.0, 100.0], s=1000.0)
    x, m, h, z, out, x0 = (negated(value) for value in (1.0, 2.0, 3.0, 4.0, 0.0, 0.0))
    got = ops.step(x, m, table, 1, history=[h], noise=z, out=out, x0_out=x0, backend=backend)
    assert torch.equal(got, torch.full((2, 5), 4321.0)) and torch.equal(x0, torch.full((2, 5), 2.0))


def test_default_device_does_not_reach_the_kernel() -> None:
    with torch.device("meta"):
        x = torch.zeros(1, 8, device="cpu")
        got = ops.step(x, x.clone(), Table([0], a=1.0, s=1.0), 0, seed=0)
    assert torch.equal(got, ops.randn((1, 8), seed=0, stream=1))
