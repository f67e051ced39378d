"""diffusers' fuse_qkv_projections() and its undoing, before attach and after it: no adapter is left out silently."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention, attention_processor
from torch import Tensor, nn

from fastsample import lora
from fastsample.lora.layers.adapted import AdaptedLayer
from fastsample.lora.layers.attention import check_called, runs_fused
from support.lora_modules import small_unet

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

State = dict[str, Tensor]
NEWER = pytest.mark.skipif(
    not hasattr(attention, "AttentionModuleMixin"), reason="this diffusers has the older blocks alone"
)
LEFT_OUT = "this projection has no adapters, but the layers that diffusers fused into it, or made of it, have"


@pytest.fixture(scope="module")
def template() -> Any:
    torch.manual_seed(1)
    return small_unet().eval().requires_grad_(False)


@pytest.fixture
def unet(template: Any) -> Any:
    return copy.deepcopy(template)


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval().requires_grad_(False)  # fmt: skip


def factors(model: nn.Module, ends: str) -> State:
    state = {}
    for name, layer in model.named_modules():
        if name.endswith(tuple(ends.split())):
            state[f"{name}.lora_A.weight"] = torch.randn(2, layer.in_features) / 4
            state[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 2) / 4
    return state


def run(unet: nn.Module) -> Tensor:
    noise = torch.Generator().manual_seed(2)
    x, context = torch.randn(2, 4, 8, 8, generator=noise), torch.randn(2, 7, 12, generator=noise)
    with torch.no_grad():
        return unet(x, torch.tensor([3, 50]), encoder_hidden_states=context).sample


def assert_near(got: Tensor, want: Tensor) -> None:
    """A whole UNet in float32, some products summed in another order."""
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@NEWER
def test_which_blocks_run_their_fused_layers(unet: Any) -> None:
    blocks = [part for part in unet.modules() if hasattr(part, "to_k")]
    assert not any(map(runs_fused, blocks))
    unet.fuse_qkv_projections()
    assert all(map(runs_fused, blocks))
    unet.unfuse_qkv_projections()
    assert not any(map(runs_fused, blocks))
    model = flux()
    [block, _] = [part for part in model.modules() if hasattr(part, "to_k")]
    model.fuse_qkv_projections()
    assert runs_fused(block)
    model.unfuse_qkv_projections()
    assert not runs_fused(block)


@pytest.mark.parametrize("make", [small_unet, pytest.param(flux, marks=NEWER)], ids=["unet", "flux"])
def test_layers_that_are_not_called_are_refused(make: Any) -> None:
    model = make()
    block = next(part for part in model.modules() if hasattr(part, "to_k"))
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"runs to_qkv, .*call unfuse_qkv_projections\(\) before attach"):
        check_called(model, [block.to_k])
    check_called(model, [block.to_qkv, block.to_out[0]])
    whole = block.to_qkv
    model.unfuse_qkv_projections()
    check_called(model, [block.to_k])
    block.to_qkv = whole
    with pytest.raises(ValueError, match=r"does not run to_qkv: call fuse_qkv_projections\(\) before attach"):
        check_called(model, [whole])


def test_a_unet_that_was_unfused_again_takes_the_single_layers(unet: Any) -> None:
    state, twin = factors(unet, "to_q to_k to_v"), copy.deepcopy(unet)
    lora.attach(twin, state)
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()
    report = lora.attach(unet, state)
    assert len(report.matched) == len(state) // 2
    assert all(name.endswith(("to_q", "to_k", "to_v")) for name in report.matched)
    assert_near(run(unet), run(twin))
    unet.set_attn_processor(attention_processor.FusedAttnProcessor2_0())
    with pytest.raises(RuntimeError, match=LEFT_OUT):
        run(unet)
    lora.detach(unet)
    assert_near(run(unet), run(copy.deepcopy(unet)))
    assert not any(part._forward_pre_hooks for part in unet.modules())


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "single"])
def test_fusing_after_attach_is_refused_and_changes_nothing(unet: Any, fuse: bool) -> None:
    state = factors(unet, "to_q to_k to_v")
    lora.attach(unet, state, fuse=fuse)
    want = run(unet)
    with pytest.raises(RuntimeError, match=r"detach\(\) them first"):
        unet.fuse_qkv_projections()
    assert torch.equal(run(unet), want)
    lora.detach(unet)
    plain = run(unet)
    unet.fuse_qkv_projections()
    assert_near(run(unet), plain)


def test_unfusing_adapted_fused_layers_is_seen(unet: Any) -> None:
    plain = run(unet)
    unet.fuse_qkv_projections()
    lora.attach(unet, factors(unet, "to_qkv to_kv"))
    want = run(unet)
    assert not torch.allclose(want, plain, atol=1e-2)
    unet.unfuse_qkv_projections()
    with pytest.raises(RuntimeError, match=LEFT_OUT):
        run(unet)
    lora.detach(unet)
    assert_near(run(unet), plain)
    assert not any(isinstance(part, AdaptedLayer) for part in unet.modules())


@NEWER
def test_newer_blocks_are_not_unfused_under_adapters() -> None:
    model = flux()
    lora.attach(model, factors(model, "to_q to_k to_v"))
    model.unfuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r"detach\(\) them first"):
        model.fuse_qkv_projections()
    lora.detach(model)
    model.fuse_qkv_projections()
    names = [name for name, _ in model.named_modules() if name.endswith("to_qkv")]
    lora.attach(model, factors(model, "to_qkv"))
    for change in (model.unfuse_qkv_projections, model.fuse_qkv_projections):
        with pytest.raises(RuntimeError, match=r"detach\(\) them first"):
            change()
    assert all(isinstance(model.get_submodule(name), AdaptedLayer) for name in names)
    lora.detach(model)
    model.unfuse_qkv_projections()
    assert not any(name.endswith("to_qkv") for name, _ in model.named_modules())
