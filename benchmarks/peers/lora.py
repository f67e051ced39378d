"""Those that the LoRA kernels are compared with: plain torch, by hand or as a module, and PEFT's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cases.lora import SCALE, Outputs, Pair, linear
from benchmarks.common.optional import optional


class Projections(nn.Module):
    """Three linears without bias, as attention's to_q, to_k and to_v are, with an adapter each: plain torch."""

    def __init__(self, weights: Sequence[Tensor], pairs: Sequence[Pair] = ()) -> None:
        super().__init__()
        self.q, self.k, self.v = (linear(weight) for weight in weights)
        self.downs = nn.ParameterList([down for down, _ in pairs])
        self.ups = nn.ParameterList([up for _, up in pairs])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        linears = (self.q, self.k, self.v)
        if not len(self.downs):
            return tuple(linear(x) for linear in linears)
        factors = zip(self.downs, self.ups, strict=True)
        return tuple(
            linear(x) + SCALE * functional.linear(functional.linear(x, down), up)
            for linear, (down, up) in zip(linears, factors, strict=True)
        )


def each(linears: Sequence[nn.Module], x: Tensor) -> Outputs:
    """One after the other, without the cost of a module around them."""
    return [linear(x) for linear in linears]


def by_hand(x: Tensor, weights: Sequence[Tensor], pairs: Sequence[Pair]) -> Outputs:
    """What one writes who wants no pass more than torch needs."""
    return [
        torch.addmm(functional.linear(x, weight), x @ down.T, up.T, alpha=SCALE)
        for weight, (down, up) in zip(weights, pairs, strict=True)
    ]


def with_peft(weights: Sequence[Tensor], pairs: Sequence[Pair], merged: bool) -> list[nn.Module] | None:
    """PEFT's layers around the same weights, or around copies where it adds the adapter to them; None without PEFT."""
    peft = optional("peft", "PEFT")
    if peft is None:
        return None
    module = Projections([weight.clone() for weight in weights] if merged else weights).eval()
    rank = len(pairs[0][0])
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["q", "k", "v"]), module
    )
    for layer, (down, up) in zip((module.q, module.k, module.v), pairs, strict=True):
        set_peft(layer, down, up)
        if merged:
            layer.merge()
    return [module.q, module.k, module.v]


def set_peft(layer: Any, down: Tensor, up: Tensor) -> None:
    """Gives PEFT's layer these factors."""
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = down, up
