"""What the tests of LoRA layers and of attach share: small modules, adapters, and float64 beside them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample.lora import LoRALinear, QKVProjection

Pair = tuple[Tensor, Tensor]
State = dict[str, Tensor]
KEEP = pytest.mark.parametrize("keep_weight", [True, False], ids=["kept", "released"])


def pair(rank: int, into: int = 7, out: int = 5, dtype: torch.dtype = torch.float32) -> Pair:
    return torch.randn(rank, into, dtype=dtype), torch.randn(out, rank, dtype=dtype)


def small_unet() -> Any:
    """A UNet2DConditionModel with attention in its first block, 8 channels wide there."""
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def layer_with(*pairs: Pair, keep_weight: bool = True, **options: Any) -> LoRALinear:
    layer = LoRALinear.from_linear(nn.Linear(7, 5), keep_weight=keep_weight, **options)
    for i, one in enumerate(pairs):
        layer.add_adapter(f"a{i}", [one])
    return layer


def qkv(**options: Any) -> tuple[list[nn.Linear], QKVProjection]:
    linears = [nn.Linear(7, 5), nn.Linear(7, 3, bias=False), nn.Linear(7, 6)]
    return linears, QKVProjection.from_linears(linears, **options)


def assert_close_to(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *adapters: tuple[Pair, float]) -> None:
    """`got` is x W^T + b + sum of factor * (x A^T) B^T, but for the roundings of its dtype.

    Each output is a sum of K + 1 products and of R per adapter, which float arithmetic gets within (count + 2) unit
    roundoffs of the sum of the magnitudes; in half precision the sum is exact enough, and t and the output are rounded.
    """
    x64, own = x.double(), [(a.double(), b.double(), abs(f), f) for (a, b), f in adapters]
    want, size = x64 @ weight.double().T, x64.abs() @ weight.double().abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    for a, b, magnitude, factor in own:
        want = want + factor * (x64 @ a.T) @ b.T
        size = size + magnitude * (x64.abs() @ a.abs().T) @ b.abs().T
    terms = x.shape[-1] + sum(len(a) for a, *_ in own) + 3
    unit = torch.finfo(x.dtype).eps / 2
    # A scale is given as float32, also to a half-precision layer.
    tolerance = (6 if unit > 2.0**-20 else terms) * unit * size
    excess = (got.double() - want).abs() - tolerance
    assert got.dtype == x.dtype
    assert excess.max() <= 0, f"error exceeds the bound by {excess.max()}"


class Net(nn.Module):
    """Two linears and a convolution of other shapes, and a linear that is used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)) for _ in range(2)])
        self.first = nn.Linear(6, 6)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return self.again(torch.tanh(self.first(x)))


SHAPES = {"conv": (6, 3, 3, 3), "blocks.0.0": (10, 6), "blocks.0.2": (6, 10), "blocks.1.2": (6, 10), "first": (6, 6)}
X = torch.linspace(-1, 1, 4 * 3 * 5 * 4).sin().reshape(4, 3, 5, 4)


def file(names: str = " ".join(SHAPES), rank: int = 2, alpha: float | None = None) -> State:
    state = {}
    for name in names.split():
        out, into, *kernel = SHAPES[name]
        state[f"{name}.lora_A.weight"] = torch.randn(rank, into, *kernel)
        state[f"{name}.lora_B.weight"] = torch.randn(out, rank, *(1 for _ in kernel))
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def merged(net: Net, *adapters: tuple[State, float]) -> Net:
    """The network with the adapters in its weights: what every attached one must compute."""
    twin = copy.deepcopy(net)
    for state, factor in adapters:
        for key in state:
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                up, down = state[f"{name}.lora_B.weight"].flatten(1), state[key].flatten(1)
                weight = twin.get_submodule(name).weight
                weight += (factor * up.to(weight) @ down.to(weight)).reshape(weight.shape)
    return twin


def assert_same(got: Tensor, want: Tensor) -> None:
    """Outputs are below 1e4 after sums of some hundred terms."""
    scale = want.abs().max().clamp(min=1)
    assert ((got - want).abs().max() / scale) <= 500 * torch.finfo(want.dtype).eps


class Unchanged:
    """Raises at the end unless a module computes, holds and consists of what it did at the start, bit for bit."""

    def __init__(self, net: nn.Module, *inputs: Tensor) -> None:
        self.net, self.inputs, self.output = net, inputs or (X,), None
        self.output = self.run()
        self.state = {name: value.clone() for name, value in net.state_dict().items()}
        self.modules = {name: id(module) for name, module in net.named_modules()}
        self.parameters = {name: (id(p), p.data_ptr()) for name, p in net.named_parameters()}

    def run(self) -> Tensor:
        with torch.no_grad():
            return self.net(*self.inputs)

    def check(self, storage: bool = True) -> None:
        state = self.net.state_dict()
        assert list(state) == list(self.state)
        assert all(torch.equal(state[name], self.state[name]) for name in state)
        assert {name: id(module) for name, module in self.net.named_modules()} == self.modules
        if storage:
            assert {name: (id(p), p.data_ptr()) for name, p in self.net.named_parameters()} == self.parameters
        assert torch.equal(self.run(), self.output)
