"""Convolutions of every kind that PEFT adapts, equal to PEFT's layers, and those that are refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from fastsample import lora
from fastsample.lora.layers.conv import CONVOLUTIONS, LoRAConv1d, LoRAConv2d, LoRAConv3d
from support.lora_modules import Unchanged

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

State = dict[str, Tensor]
# The convolution, and the shape of an input.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(3, 5, 3, padding=1), (4, 3, 11)),
    "1d-strided-same": (lambda: nn.Conv1d(3, 5, 4, padding="same"), (4, 3, 11)),
    "1d-groups": (lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2), (4, 4, 11)),
    "1d-depthwise": (lambda: nn.Conv1d(4, 4, 5, padding=2, groups=4, bias=False), (4, 4, 9)),
    "1d-point": (lambda: nn.Conv1d(3, 5, 1), (4, 3, 7)),
    "2d-groups": (lambda: nn.Conv2d(6, 10, (3, 2), padding=1, groups=2), (4, 6, 7, 5)),
    "2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 4, 6, 5)),
    "2d-groups-point": (lambda: nn.Conv2d(4, 6, 1, groups=2), (4, 4, 6, 5)),
    "3d": (lambda: nn.Conv3d(3, 5, (1, 2, 3), stride=(1, 2, 1)), (4, 3, 3, 6, 5)),
    "3d-groups": (lambda: nn.Conv3d(4, 6, 2, groups=2, bias=False), (4, 4, 3, 4, 5)),
    "3d-point": (lambda: nn.Conv3d(3, 5, 1), (4, 3, 2, 3, 4)),
}
EACH = pytest.mark.parametrize("name", KINDS)


def peft_model(net: nn.Module, rank: int = 4) -> Any:
    config = peft.LoraConfig(r=rank, lora_alpha=7, target_modules=["0"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups")
        return peft.get_peft_model(copy.deepcopy(net), config)


def state_of(model: Any, alpha: float = 7.0) -> State:
    state = {
        key.removeprefix("base_model.model."): value for key, value in peft.get_peft_model_state_dict(model).items()
    }
    return {**state, "0.alpha": torch.tensor(alpha)}


def made(name: str, rank: int = 4) -> tuple[nn.Sequential, Tensor, State, Tensor]:
    """A network of one convolution, an input, a file for it, and what PEFT computes."""
    make, shape = KINDS[name]
    net, x = nn.Sequential(make()).requires_grad_(False), torch.randn(shape)
    theirs = peft_model(net, rank)
    with torch.no_grad():
        return net, x, state_of(theirs), theirs(x)


def assert_near(got: Tensor, want: Tensor) -> None:
    """Sums of at most 60 products in float32, and as many more through A and B."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@EACH
def test_equals_peft(name: str) -> None:
    net, x, state, want = made(name)
    plain = net(x)
    unchanged = Unchanged(net, x)
    report = lora.attach(net, state)
    assert report.matched == ("0",)
    assert type(net[0]) in CONVOLUTIONS
    assert_near(net(x), want)
    assert not torch.allclose(plain, want, atol=1e-2)
    again = lora.state_dict(net)
    lora.detach(net)
    unchanged.check()
    lora.attach(net, again)
    assert_near(net(x), want)


@EACH
def test_several_adapters_for_all_and_for_each_sample(name: str) -> None:
    net, x, one, want = made(name)
    plain, theirs = net(x), peft_model(net, rank=8)
    two = state_of(theirs)
    lora.attach(net, one, "one", capacity=9)
    lora.attach(net, two, "two")
    with torch.no_grad():
        other = theirs(x)
    lora.set_adapters(net, {"two": -0.5, "one": 2.0})
    assert_near(net(x), plain + 2 * (want - plain) - 0.5 * (other - plain))
    lora.set_adapters(net, {"one": 1.0, "two": 1.0})
    lora.set_adapter_index(net, torch.tensor([1, -1, 0, 1]))
    assert_near(net(x), torch.stack([y[i] for i, y in enumerate((other, plain, want, other))]))
    lora.set_adapter_index(net, None)
    lora.detach(net, "two")
    lora.swap(net, two, "one")
    assert_near(net(x), other)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))


@pytest.mark.parametrize("name", ["1d-groups", "2d-depthwise", "3d"])
def test_gradients_are_pefts(name: str) -> None:
    make, shape = KINDS[name]
    net, x = nn.Sequential(make()).requires_grad_(False), torch.randn(shape)
    theirs = peft_model(net)
    theirs(x).square().sum().backward()
    wants = {key.rsplit(".default", 1)[0]: p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    state = {key: value.clone().requires_grad_(key != "0.alpha") for key, value in state_of(theirs).items()}
    lora.attach(net, state)
    net(x).square().sum().backward()
    for key, want in wants.items():
        got = state[f"{key.removeprefix('base_model.model.')}.weight"].grad
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize(("point", "kind"), [(nn.Conv1d(3, 5, 1), 1), (nn.Conv2d(3, 5, 1), 2), (nn.Conv3d(3, 5, 1), 3)])
@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_a_convolution_of_size_1_takes_every_pair_without_a_kernel(point: nn.Module, kind: int, axes: int) -> None:
    down, up = torch.randn(2, 3), torch.randn(5, 2)
    net, x = nn.Sequential(copy.deepcopy(point)).requires_grad_(False), torch.randn(4, 3, *range(2, 2 + kind))
    want = net(x) + torch.einsum("or,ri,bi...->bo...", up, down, x)
    ones = (1,) * axes
    lora.attach(net, {"0.lora_A.weight": down.reshape(2, 3, *ones), "0.lora_B.weight": up.reshape(5, 2, *ones)})
    assert_near(net(x), want)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_linear_takes_them_too(axes: int) -> None:
    net, x, ones = nn.Sequential(nn.Linear(3, 5)).requires_grad_(False), torch.randn(4, 3), (1,) * axes
    down, up = torch.randn(2, 3, *ones), torch.randn(5, 2, *ones)
    want = net(x) + x @ down.reshape(2, 3).T @ up.reshape(5, 2).T
    lora.attach(net, {"0.lora_A.weight": down, "0.lora_B.weight": up})
    assert_near(net(x), want)


def test_groups_take_a_whole_b_too() -> None:
    """As kohya's and LyCORIS' files have it: 1x1 without groups."""
    net, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).requires_grad_(False), torch.randn(2, 4, 5, 6)
    down, up = torch.randn(3, 4, 3, 3), torch.randn(6, 3, 1, 1)
    want = net(x) + nn.functional.conv2d(nn.functional.conv2d(x, down), up)
    lora.attach(net, {"0.lora_A.weight": down, "0.lora_B.weight": up})
    assert_near(net(x), want)


def test_groups_cannot_be_merged() -> None:
    net, x, state, _ = made("2d-groups", rank=6)
    lora.attach(net, state)
    unchanged = Unchanged(net, x)
    with pytest.raises(RuntimeError, match=r"merge: .*groups read channels that its weight does not"):
        net[0].merge()
    unchanged.check()
    lora.set_adapters(net, {})
    net[0].merge()
    net[0].unmerge()


def test_a_plain_one_of_other_dimensions_can() -> None:
    net, x, state, want = made("3d")
    lora.attach(net, state)
    net[0].merge()
    assert_near(net(x), want)
    net[0].unmerge()
    assert_near(net(x), want)


@pytest.mark.parametrize("name", ["1d", "2d-depthwise", "3d-groups"])
def test_compiled_once(name: str, compiler: Any) -> None:
    net, x, state, want = made(name)
    lora.attach(net, state, capacity=8)
    compiled = torch.compile(net, backend=compiler, fullgraph=True)
    with torch.no_grad():
        assert_near(compiled(x), want)
        lora.swap(net, state_of(peft_model(net_of(name), rank=8)))
        assert_near(compiled(x), net(x))
    assert compiler.frame_count == 1


def net_of(name: str) -> nn.Sequential:
    return nn.Sequential(KINDS[name][0]())


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "transposed-1d": (lambda: nn.ConvTranspose1d(3, 5, 2), (2, 3, 2), (5, 2, 1)),
    "transposed-2d": (lambda: nn.ConvTranspose2d(3, 5, 2), (2, 3, 2, 2), (5, 2, 1, 1)),
    "transposed-3d": (lambda: nn.ConvTranspose3d(3, 5, 2), (2, 3, 2, 2, 2), (5, 2, 1, 1, 1)),
    "rank-of-no-group": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 3, 3), (6, 1, 1, 1)),
    "kernel": (lambda: nn.Conv1d(3, 5, 3), (2, 3, 2), (5, 2, 1)),
    "a-of-one-group": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 2, 3), (6, 1, 1)),
    "b-of-other-groups": (lambda: nn.Conv1d(4, 8, 3, groups=2), (4, 4, 3), (8, 1, 1)),
    "axes": (lambda: nn.Conv2d(3, 5, 3), (2, 3, 3), (5, 2, 1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_anything_changes(name: str) -> None:
    make, down, up = REFUSED[name]
    net = nn.Sequential(nn.Linear(3, 4), make()).requires_grad_(False)
    before, linear = dict(net.named_modules()), net[0]
    state = {"0.lora_A.weight": torch.ones(1, 3), "0.lora_B.weight": torch.ones(4, 1)}
    with pytest.raises(ValueError, match=r"1\.lora|\b1\b"):
        lora.attach(net, {**state, "1.lora_A.weight": torch.ones(down), "1.lora_B.weight": torch.ones(up)})
    assert dict(net.named_modules()) == before
    assert net[0] is linear


@pytest.mark.parametrize("kind", [LoRAConv1d, LoRAConv2d, LoRAConv3d])
def test_a_layer_takes_the_place_of_its_own_kind_alone(kind: Any) -> None:
    for conv in (
        nn.Conv1d(3, 5, 2),
        nn.Conv2d(3, 5, 2),
        nn.Conv3d(3, 5, 2),
        nn.ConvTranspose2d(3, 5, 2),
        nn.Linear(3, 5),
    ):
        if isinstance(conv, kind._replaces):
            assert isinstance(kind.from_conv(conv), type(conv))
        else:
            with pytest.raises(
                TypeError, match=f"plain {kind._replaces.__name__} .*it is no {kind._replaces.__name__}"
            ):
                kind.from_conv(conv)


@pytest.mark.parametrize(
    ("conv", "shape", "factors"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9), [(4, 4, 3), (6, 2, 1)]),
        (nn.Conv3d(3, 5, 2), (2, 3, 4, 4, 4), [(4, 3, 2, 2, 2), (5, 4, 1, 1, 1)]),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), [(4, 4, 3, 3), (4, 1, 1, 1)]),
    ],
    ids=["1d-groups", "3d", "depthwise"],
)
def test_they_are_trained_too(conv: nn.Module, shape: tuple[int, ...], factors: list[tuple[int, ...]]) -> None:
    model, x = nn.Sequential(nn.Sequential(conv)), torch.randn(shape)
    adapted = lora.Trainable(model, rank=4, targets=["0.0"])
    assert [tuple(factor.shape) for factor in adapted.factors] == factors
    assert torch.equal(adapted(x), model(x))
    adapted(x).square().sum().backward()
    assert adapted.factors[1].grad.abs().max() > 0
    with torch.no_grad():
        adapted.factors[1].normal_()
    lora.attach(model, adapted.lora())
    torch.testing.assert_close(model(x), adapted(x).detach(), rtol=0, atol=1e-5)


def test_groups_must_divide_the_rank() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Linear(7, 7)))
    with pytest.raises(ValueError, match=r"targets: 0\.0 cannot .* 2 groups, which do not divide the rank 3"):
        lora.Trainable(model, rank=3, targets=["0.0"])
    assert list(lora.Trainable(model, rank=3).lora()) == ["0.1.lora_A.weight", "0.1.lora_B.weight"]
