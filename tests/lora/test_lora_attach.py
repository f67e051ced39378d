"""attach and what follows it on plain networks: equality with PEFT, several adapters, swaps, and back."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from fastsample import lora
from fastsample.lora import LoRAConv2d, LoRALinear
from support.lora_modules import KEEP, SHAPES, Net, Unchanged, X, assert_same, file, merged

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


@pytest.fixture
def net() -> Net:
    return Net().eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_peft(net: Net, dtype: torch.dtype, tmp_path: Path) -> None:
    net.to(dtype).again = nn.Identity()  # which PEFT would leave alone
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["conv", "blocks.0.0", "blocks.1.2", "first"],
        rank_pattern={"first": 4},
        alpha_pattern={"conv": 1.5},
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(copy.deepcopy(net), config)
    theirs.save_pretrained(tmp_path)
    report = lora.attach(net, tmp_path)
    assert set(report.matched) == {"conv", "blocks.0.0", "blocks.1.2", "first"}
    assert_same(net(X.to(dtype)), theirs(X.to(dtype)).detach())


@KEEP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attach_set_detach(net: Net, keep_weight: bool, dtype: torch.dtype) -> None:
    net.to(dtype)
    x = X.to(dtype)
    unchanged, plain = Unchanged(net, x), copy.deepcopy(net)
    one, two = file(), file("blocks.0.0 first", rank=3, alpha=6.0)
    lora.attach(net, one, "one", scale=0.5, keep_weight=keep_weight)
    assert_same(net(x), merged(plain, (one, 0.5))(x))
    assert net.again is net.first
    report = lora.attach(net, two, "two", keep_weight=keep_weight)
    assert report == lora.Report(("blocks.0.0", "first"), (), ())
    assert_same(net(x), merged(plain, (one, 0.5), (two, 2.0))(x))
    state = net.state_dict()
    assert list(state) == list(unchanged.state)
    assert all(torch.equal(state[name], value) for name, value in unchanged.state.items())
    lora.set_adapters(net, {"two": -1.0, "one": 0.25})
    assert_same(net(x), merged(plain, (one, 0.125), (two, -2.0))(x))
    lora.set_adapters(net, {"two": 1.0})
    assert_same(net(x), merged(plain, (two, 2.0))(x))
    lora.detach(net, "one")
    assert type(net.conv) is nn.Conv2d
    assert type(net.first) is LoRALinear
    assert_same(net(x), merged(plain, (two, 2.0))(x))
    lora.detach(net, "two")
    unchanged.check(storage=keep_weight)
    lora.attach(net, one, keep_weight=keep_weight)
    lora.attach(net, two, "two", keep_weight=keep_weight)
    net.first.merge()
    lora.detach(net)
    unchanged.check(storage=keep_weight)
    lora.detach(net)


def test_sources_are_files_and_state_dicts(net: Net, tmp_path: Path) -> None:
    state, twin = file(), copy.deepcopy(net)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    lora.attach(net, state)
    for source in (tmp_path / "a.safetensors", str(tmp_path), {f"unet.{key}": value for key, value in state.items()}):
        lora.attach(twin, source)
        assert torch.equal(twin(X), net(X))
        lora.detach(twin)


def test_what_a_file_has_beside_is_reported(net: Net) -> None:
    state = {f"unet.{key}": value for key, value in file("first conv").items()}
    text = {f"text_encoder.layer.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    extra = {f"unet.gone.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    assert lora.attach(net, {**state, **text}, "text").elsewhere == ("text_encoder.layer",)
    report = lora.attach(net, {**state, **extra}, "extra", strict=False)
    assert (set(report.matched), report.unmatched) == ({"first", "conv"}, ("unet.gone",))
    lora.detach(net)
    unchanged = Unchanged(net)
    assert lora.attach(net, extra, strict=False) == lora.Report((), ("unet.gone",), ())
    unchanged.check()


@KEEP
def test_swap(net: Net, keep_weight: bool) -> None:
    plain, one, two = copy.deepcopy(net), file(), file("blocks.0.0 conv", rank=3)
    lora.attach(net, one, capacity=4, keep_weight=keep_weight)
    lora.swap(net, two, scale=0.5)
    assert_same(net(X), merged(plain, (two, 0.5))(X))
    assert {key.rpartition(".lora")[0] for key in lora.state_dict(net) if "lora_A" in key} == {"blocks.0.0", "conv"}
    unchanged = Unchanged(net)
    with pytest.raises(ValueError, match="rank 5, capacity is 4"):
        lora.swap(net, file("conv first", rank=5))
    unchanged.check()
    lora.swap(net, one)
    assert_same(net(X), merged(plain, (one, 1.0))(X))


def test_a_compiled_network_goes_on_without_compiling(net: Net, compiler: Any) -> None:
    plain, one, two, three = copy.deepcopy(net), file(), file("blocks.0.0 conv", rank=3), file("first", rank=1)
    lora.attach(net, one, "one", capacity=4)
    lora.attach(net, three, "three")
    compiled = torch.compile(net, backend=compiler, fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(X), merged(plain, (one, 1.0), (three, 1.0))(X))
        lora.swap(net, two, "one", scale=0.5)
        assert_same(compiled(X), merged(plain, (two, 0.5), (three, 1.0))(X))
        lora.set_adapters(net, {"one": 0.5, "three": 2.0})
        assert_same(compiled(X), merged(plain, (two, 0.25), (three, 2.0))(X))
        assert compiler.frame_count == 1
        lora.set_adapter_index(net, torch.tensor([0, 1, -1, 1]))
        assert_same(compiled(X), net(X))
        lora.set_adapter_index(net, torch.tensor([1, -1, 0, 0]))
        assert_same(compiled(X), net(X))
        assert compiler.frame_count == 2
        lora.attach(compiled, one, "again")
        lora.set_adapter_index(net, None)
        assert_same(compiled(X), merged(plain, (two, 0.25), (three, 2.0), (one, 1.0))(X))
        assert set(lora.state_dict(compiled, "again")) == set(lora.state_dict(net, "again"))


@KEEP
def test_each_sample_gets_its_adapter(net: Net, keep_weight: bool) -> None:
    plain, one, two = copy.deepcopy(net), file(), file("conv blocks.0.2", rank=3)
    lora.attach(net, one, "one", keep_weight=keep_weight)
    lora.attach(net, two, "two", keep_weight=keep_weight)
    lora.set_adapters(net, {"two": 0.5, "one": 2.0})
    lora.set_adapter_index(net, torch.tensor([1, -1, 0, 1]))
    wants = [merged(plain, (one, 2.0)), plain, merged(plain, (two, 0.5)), merged(plain, (one, 2.0))]
    assert_same(net(X), torch.stack([want(X)[i] for i, want in enumerate(wants)]))
    with pytest.raises(ValueError, match="sample of x"):
        net(X[:3])
    lora.set_adapters(net, {"two": 1.0, "one": 1.0})
    three = file("blocks.1.2")
    lora.attach(net, three, "three")
    lora.set_adapter_index(net, torch.tensor([2, 0, 0, -1]))
    wants = [merged(plain, (three, 1.0)), *[merged(plain, (two, 1.0))] * 2, plain]
    assert_same(net(X), torch.stack([want(X)[i] for i, want in enumerate(wants)]))
    unchanged = Unchanged(net)
    for call in (
        lambda: lora.set_adapters(net, {"one": 1.0, "two": 1.0, "three": 1.0}),
        lambda: lora.detach(net, "two"),
    ):
        with pytest.raises(ValueError, match=r"adapter_index .*two, one, three.*set_adapter_index\(module, None\)"):
            call()
    unchanged.check()
    lora.set_adapter_index(net, None)
    assert_same(net(X), merged(plain, (one, 1.0), (two, 1.0), (three, 1.0))(X))
    lora.set_adapter_index(net, torch.tensor([0, 0, 0, 0]))
    lora.detach(net)
    assert torch.equal(net(X), plain(X))


@pytest.mark.parametrize("scale", [1.0, -0.75, 0.0])
def test_state_dict_attaches_again(net: Net, scale: float, tmp_path: Path) -> None:
    twin = copy.deepcopy(net)
    lora.attach(net, file(rank=3, alpha=5.0), scale=scale)
    state = lora.state_dict(net)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    lora.attach(twin, tmp_path / "a.safetensors")
    assert len(state) == 2 * len(SHAPES)
    assert_same(twin(X), net(X))


@KEEP
def test_life_goes_on_while_attached(net: Net, keep_weight: bool) -> None:
    plain, state = copy.deepcopy(net), file()
    lora.attach(net, state, keep_weight=keep_weight)
    net.double().train()
    want = merged(plain.double(), (state, 1.0))(X.double())
    assert_same(net(X.double()), want)
    twin = copy.deepcopy(net)
    back = pickle.loads(pickle.dumps(net))
    for one in (twin, back):
        assert torch.equal(one(X.double()), net(X.double()))
        assert one.again is one.first
        lora.set_adapters(one, {})
    assert_same(net(X.double()), want)
    plain.load_state_dict({name: value / 2 for name, value in net.state_dict().items()})
    net.load_state_dict(plain.state_dict())
    assert_same(net(X.double()), merged(plain, (state, 1.0))(X.double()))
    net.load_state_dict(plain.state_dict(), assign=True)
    net.requires_grad_().blocks[0][0].register_forward_hook(lambda *_: None)
    lora.detach(net)
    assert [type(module) for module in net.modules()] == [type(module) for module in plain.modules()]
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in net.state_dict().items())
    assert len(net.blocks[0][0]._forward_hooks) == 1
    lora.detach(twin)
    assert torch.equal(twin(X.double()), back(X.double()))


def test_torchs_encoder_layer_calls_its_linears() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval().requires_grad_(False)
    x, unchanged = torch.randn(3, 4, 8), Unchanged(layer, torch.randn(3, 4, 8))
    state = {"linear1.lora_A.weight": torch.randn(2, 8), "linear1.lora_B.weight": torch.randn(16, 2)}
    slow = copy.deepcopy(layer).train()
    slow.linear1.weight += state["linear1.lora_B.weight"] @ state["linear1.lora_A.weight"]
    lora.attach(layer, state, "a")
    lora.attach(layer, state, "b")
    lora.set_adapters(layer, {"a": 0.25, "b": 0.75})
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), slow(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(layer)(x), slow(x), rtol=1e-5, atol=1e-5)
    lora.detach(layer)
    unchanged.check()
    assert not layer._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoder_takes_padded_sequences() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    x, padded = torch.randn(3, 4, 8), torch.arange(4) >= torch.tensor([[4], [2], [3]])
    state = {"layers.0.linear1.lora_A.weight": torch.randn(2, 8), "layers.0.linear1.lora_B.weight": torch.randn(16, 2)}
    slow = copy.deepcopy(encoder).train()
    slow.layers[0].linear1.weight += state["layers.0.linear1.lora_B.weight"] @ state["layers.0.linear1.lora_A.weight"]
    with torch.inference_mode():
        before = encoder(x, src_key_padding_mask=padded)
        lora.attach(encoder, state)
        want = slow(x, src_key_padding_mask=padded)
        for one in (encoder, copy.deepcopy(encoder)):
            got = one(x, src_key_padding_mask=padded)
            torch.testing.assert_close(got[~padded], want[~padded], rtol=1e-5, atol=1e-5)
        lora.detach(encoder)
        assert encoder.use_nested_tensor
        assert torch.equal(encoder(x, src_key_padding_mask=padded), before)


def test_detach_leaves_ones_own_layers(net: Net) -> None:
    net.blocks[0][0] = own = LoRALinear.from_linear(net.blocks[0][0])
    own.add_adapter("mine", [(torch.ones(2, 6), torch.ones(10, 2))])
    before = net(X)
    lora.attach(net, file(), "a")
    lora.attach(net, file("conv"), "b")
    assert not torch.equal(net(X), before)
    lora.detach(net, "b")
    assert own.adapters == ("mine", "a")
    lora.attach(net, file("first"), "c")
    lora.detach(net)
    assert net.blocks[0][0] is own
    assert (own.adapters, own._frozen.adapters.active) == (("mine",), {"mine": 1.0})
    assert type(net.first) is nn.Linear
    assert torch.equal(net(X), before)
    lora.detach(net, "mine")
    assert net.blocks[0][0] is own
    assert own.adapters == ()


def test_detach_frees_at_once(net: Net) -> None:
    lora.attach(net, file())
    packed = weakref.ref(net.first._frozen._packed)
    gc.disable()
    try:
        lora.detach(net)
        assert packed() is None
    finally:
        gc.enable()


def test_gradients_reach_the_factors(net: Net) -> None:
    state = {key: value.requires_grad_() for key, value in file().items()}
    lora.attach(net, state)
    net(X).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in state.values())


def test_modules_that_are_not_attached_stay(net: Net) -> None:
    before = dict(net.named_modules())
    lora.attach(net, file("blocks.0.0 conv"))
    after = dict(net.named_modules())
    changed = {name for name in before if before[name] is not after[name]}
    assert changed == {"conv", "blocks.0.0"}
    assert type(net.conv) is LoRAConv2d
