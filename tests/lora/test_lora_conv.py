"""LoRAConv2d against the convolution by the summed weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample.lora import LoRAConv2d
from support.lora_modules import pair

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


CONVS = {
    "3x3": dict(kernel_size=3, padding=1),
    "1x1": dict(kernel_size=1, bias=False),
    "strided": dict(kernel_size=(3, 2), stride=2, dilation=(2, 1)),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("name", CONVS)
def test_conv_is_the_conv_of_the_sum(name: str) -> None:
    conv = nn.Conv2d(3, 5, **CONVS[name]).double()
    kernel, x = conv.weight.shape[2:], torch.randn(4, 3, 9, 8, dtype=torch.float64)
    down, up = torch.randn(2, 3, *kernel).double(), torch.randn(5, 2, 1, 1).double()
    more = torch.randn(1, 3, *kernel).double(), torch.randn(5, 1, 1, 1).double()
    whole = copy.deepcopy(conv)
    layer = LoRAConv2d.from_conv(conv, capacity=3)
    layer.add_adapter("a", [(down, up)], scale=0.5, alpha=4)
    layer.add_adapter("b", [more])
    layer.set_adapters({"b": -2.0, "a": 1.0})

    def adapted(**weights: float) -> Tensor:
        deltas = {"a": torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)}
        deltas["b"] = torch.einsum("or,rihw->oihw", more[1][:, :, 0, 0], more[0])
        weight = sum((w * deltas[key] for key, w in weights.items()), start=conv.weight)
        whole.weight = nn.Parameter(weight)
        return whole(x)

    # Sums of some 30 terms below 100 in float64.
    close = dict(rtol=0, atol=1e-11)
    torch.testing.assert_close(layer(x), adapted(a=1.0, b=-2.0), **close)
    index = torch.tensor([1, -1, 0, 1])
    alone = [adapted(a=1.0), adapted(), adapted(b=-2.0), adapted(a=1.0)]
    torch.testing.assert_close(layer(x, index), torch.stack([y[i] for i, y in enumerate(alone)]), **close)
    before, want = conv.weight.detach().clone(), layer(x)
    layer.merge()
    torch.testing.assert_close(conv(x), want, **close)
    torch.testing.assert_close(layer(x), want, **close)
    layer.unmerge()
    assert torch.equal(conv.weight, before)
    assert torch.equal(copy.deepcopy(layer)(x), want)


def test_half_precision_is_as_exact_as_torchs() -> None:
    conv, x = nn.Conv2d(3, 5, 3, dtype=torch.bfloat16), torch.randn(4, 3, 9, 8, dtype=torch.bfloat16)
    down, up = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    layer = LoRAConv2d.from_conv(conv)
    layer.add_adapter("a", [(down, up)], scale=0.5)

    def by_hand(dtype: torch.dtype) -> Tensor:
        a, b = (factor.bfloat16().to(dtype) for factor in (down, up))
        weight, bias = conv.weight.to(dtype), conv.bias.to(dtype)
        base = nn.functional.conv2d(x.to(dtype), weight, bias)
        return base + nn.functional.conv2d(nn.functional.conv2d(x.to(dtype), a) * 0.5, b)

    with torch.no_grad():
        want, got = by_hand(torch.float64), layer(x)
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() <= 2 * (by_hand(torch.bfloat16) - want).norm()


def test_conv_is_frozen_and_checks_the_index() -> None:
    layer, x = LoRAConv2d.from_conv(nn.Conv2d(3, 5, 3)), torch.randn(2, 3, 6, 6, requires_grad=True)
    for active in (0, 1):
        layer(x).sum().backward()
        assert x.grad.abs().max() > 0
        assert layer.weight.grad is None
        assert layer.bias.grad is None
        with pytest.raises(IndexError, match=rf"adapter_index\[1\] is {active}"):
            layer(x, torch.tensor([-1, active]))
        if not active:
            layer.add_adapter("a", [(torch.ones(2, 3, 3, 3), torch.ones(5, 2, 1, 1))])


def test_conv_trains_compiles_and_refuses(compiler: Any) -> None:
    layer, x = LoRAConv2d.from_conv(nn.Conv2d(3, 5, 3), capacity=2), torch.randn(2, 3, 6, 6)
    down, up = torch.randn(2, 3, 3, 3, requires_grad=True), torch.randn(5, 2, 1, 1, requires_grad=True)
    layer.add_adapter("a", [(down, up)])
    layer(x).sum().backward()
    assert down.grad.abs().max() > 0
    assert up.grad.abs().max() > 0
    with torch.no_grad():
        before = layer(x)
        up.mul_(2)
        assert not torch.equal(layer(x), before)
        layer._frozen.replace("a", [(down.detach(), up.detach())], 1.0)
        compiled = torch.compile(layer, backend=compiler, fullgraph=True)
        compiled(x)
        layer.set_adapters({"a": 0.5})
        layer._frozen.replace("a", [(torch.randn(1, 3, 3, 3), torch.randn(5, 1, 1, 1))], 2.0)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-5)
    assert compiler.frame_count == 1
    for bad_index in (torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="one int64 per sample"):
            layer(x, bad_index)
    with pytest.raises(ValueError, match=r"A \(r, 3, 3, 3\) and B \(5, r, 1, 1\)"):
        layer.add_adapter("b", [pair(2)])
