"""What the model is given and what it may not do: dtypes, wrappers, written inputs, training mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample import Schedule, ddim, ops
from fastsample.model import Predictor

SHAPE = (2, 4, 6, 5)
X = ops.randn(SHAPE, seed=1)
BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32


class Net(nn.Module):
    """Convolutions in one dtype and whatever else in others; refuses an input of another dtype, as torch does."""

    def __init__(self, dtype: torch.dtype = BF16, **islands: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, island in islands.items():
            setattr(self, name, island)
        self.conv = nn.Conv2d(4, 4, 1).to(dtype)
        self.seen: list[torch.dtype] = []
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return 0.1 * self.conv(x)


def dtype_of(model: Any) -> torch.dtype:
    return Predictor(model).dtype


# The dtype that computing layers want


@pytest.mark.parametrize(
    "islands",
    [
        pytest.param({"table": nn.Parameter(torch.zeros(1, 4, 1, 1))}, id="table"),
        pytest.param({"norm": nn.GroupNorm(2, 4)}, id="norm"),
        pytest.param({"classes": nn.Embedding(1000, 64)}, id="embedding"),
        pytest.param({"time": nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))}, id="time"),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
def test_an_island_of_float32_is_not_the_models_dtype(dtype: torch.dtype, islands: dict[str, Any]) -> None:
    net = Net(dtype, **islands)
    ddim(net, X, steps=2, schedule=Schedule.linear())
    assert net.seen == [dtype] * 2


def linears(**layers: torch.dtype) -> nn.Module:
    module = nn.Module()
    for name, dtype in layers.items():
        setattr(module, name, nn.Linear(64, 16 if "small" in name else 64).to(dtype))
    return module.eval()


class Stating(nn.Module):
    def __init__(self, dtype: Any, held: torch.dtype = FP32) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).to(held)
        self.dtype = dtype


def float8(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    return module


def quantised(bias: torch.dtype) -> nn.Module:
    """As bitsandbytes and others keep weights: integers, and scales in float32 beside them."""
    layer = nn.Linear(4, 4).to(bias)
    layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight_scale = nn.Parameter(torch.ones(4, 1), requires_grad=False)
    return layer


class Packed(nn.Module):
    """Frozen weights as buffers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("index", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("packed", torch.zeros(3, 3, dtype=dtype))


@pytest.mark.parametrize(
    ("module", "want"),
    [
        pytest.param(linears(time_mlp=FP32, small=BF16), BF16, id="time-embedding-apart"),
        pytest.param(linears(small=FP32, body=BF16), BF16, id="most-weights"),
        pytest.param(linears(time=HALF), HALF, id="nothing-but-time"),
        pytest.param(Stating(BF16), BF16, id="stated"),
        pytest.param(Stating(torch.float8_e4m3fn, BF16), BF16, id="stated-float8"),
        pytest.param(Stating(torch.int8, BF16), BF16, id="stated-integer"),
        pytest.param(Stating("bfloat16", HALF), HALF, id="stated-text"),
        pytest.param(Stating(None, HALF), HALF, id="stated-none"),
        pytest.param(float8(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))), FP32, id="float8"),
        pytest.param(float8(nn.Linear(4, 4).bfloat16()), BF16, id="float8-and-bias"),
        pytest.param(float8(nn.Linear(4, 4, bias=False)), FP32, id="float8-alone"),
        pytest.param(nn.Sequential(quantised(BF16), nn.LayerNorm(2, dtype=BF16)), BF16, id="integers"),
        pytest.param(nn.GRU(4, 4).to(HALF), HALF, id="recurrent"),
        pytest.param(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1)).to(BF16), BF16, id="weight-norm"),
        pytest.param(nn.MultiheadAttention(8, 2, dtype=BF16), BF16, id="attention"),
        pytest.param(Packed(HALF), HALF, id="buffers"),
        pytest.param(nn.Linear(4, 4).double(), torch.float64, id="float64"),
        pytest.param(nn.Identity(), FP32, id="nothing"),
    ],
)
def test_the_dtype_of_a_module(module: nn.Module, want: torch.dtype) -> None:
    assert dtype_of(module) == want
    assert dtype_of(lambda x, t: module(x)) == want
