"""A model that was pickled when classes lived in other modules, and layers inherited their adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsample import lora
from fastsample.ops import lora_linear
from support.paths import GOLDEN


@pytest.fixture
def pickled() -> Any:
    """A convolution, a linear and a projection with the adapter "style", and a call of lora_linear, with results."""
    return torch.load(GOLDEN / "lora_earlier_modules.pt", weights_only=False)


def test_an_earlier_pickle_is_the_same_model(pickled: Any) -> None:
    net = pickled["net"]
    for module, x, want in zip(net, pickled["xs"], pickled["ys"], strict=True):
        torch.testing.assert_close(module(x), want)
    lora.set_adapters(net, {"style": 0.0})
    assert not torch.allclose(net[1](pickled["xs"][1]), pickled["ys"][1])
    lora.set_adapters(net, {"style": 1.0})
    torch.testing.assert_close(net[1](pickled["xs"][1]), pickled["ys"][1])
    layer = net[1]
    lora.detach(net)
    assert type(net[1]) is torch.nn.Linear and net[1].weight is layer.weight
    assert net[2].adapters == ("style",)


def test_so_are_earlier_packs(pickled: Any) -> None:
    packed, adapters = pickled["lora_linear"]
    [y] = lora_linear(pickled["xs"][1], packed, adapters)
    torch.testing.assert_close(y, pickled["y"])
