"""PEFT's LoRAs in accelerated pipelines: weights, scales, what is left to PEFT, and diffusers' own methods for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastsample
from fastsample import lora
from support.small_pipelines import NEAR, Before, Image, add_lora, image, stable_diffusion, stable_diffusion_3

pytestmark = [
    pytest.mark.usefixtures("one_thread_and_seed"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def with_two() -> Any:
    pipe = stable_diffusion()
    add_lora(pipe.unet, "style")
    add_lora(pipe.unet, "sketch", ["to_q", "to_out.0"], rank=2, use_rslora=True)
    return pipe


def agrees(pipe: Any, want: Image) -> bool:
    return bool(np.abs(image(pipe) - want).max() <= NEAR)


def peft_is_gone(pipe: Any) -> bool:
    return not any(hasattr(module, "lora_A") for module in pipe.unet.modules())


def by_block(pipe: Any) -> None:
    pipe.set_adapters(["style", "sketch"], [{"unet": {"down": 0.2, "mid": 1.0}}, 0.7])


def deleted(pipe: Any) -> None:
    pipe.set_adapters(["style", "sketch"], [0.5, 0.5])
    pipe.delete_adapters(["style"])


# What a user does before accelerate, and the weights that are reported.
STATES: dict[str, tuple[Callable[[Any], object], dict[str, float]]] = {
    "the-last-one": (lambda pipe: None, {"sketch": 1.0}),
    "both": (lambda pipe: pipe.set_adapters(["sketch", "style"], [0.7, 0.3]), {"sketch": 0.7, "style": 0.3}),
    "negative": (lambda pipe: pipe.set_adapters(["style"], [-0.4]), {"style": -0.4}),
    "zero": (lambda pipe: pipe.set_adapters(["style", "sketch"], [0.0, 0.3]), {"style": 0.0, "sketch": 0.3}),
    "by-block": (by_block, {"style": 1.0, "sketch": 0.7}),
    "disabled": (lambda pipe: pipe.disable_lora(), {}),
    "deleted": (deleted, {"sketch": 0.5}),
}


@pytest.mark.parametrize("state", STATES)
def test_weights_are_those_of_set_adapters(state: str) -> None:
    pipe = with_two()
    at_first = image(pipe)
    change, weights = STATES[state]
    change(pipe)
    before = Before(pipe)
    assert state == "the-last-one" or np.abs(before.image - at_first).max() > 2 * NEAR
    [unet] = fastsample.accelerate(pipe).components
    assert list(unet.weights) == list(weights) and unet.weights == pytest.approx(weights, rel=1e-12)
    assert set(unet.moved) == ({"sketch"} if state == "deleted" else {"style", "sketch"}) and not unet.left
    assert peft_is_gone(pipe) and agrees(pipe, before.image)
    fastsample.restore(pipe)
    before.check()


def test_adapters_that_are_not_active_can_be_made_so() -> None:
    pipe = with_two()
    pipe.set_adapters(["style"], [0.5])
    want = image(pipe)
    pipe.set_adapters(["sketch"], [1.0])
    fastsample.accelerate(pipe)
    assert not agrees(pipe, want)
    lora.set_adapters(pipe.unet, {"style": 0.5})
    assert agrees(pipe, want)
    assert fastsample.accelerate(pipe).components[0].weights == {"style": 0.5}, "not those of the first call"


def test_layers_whose_active_adapters_differ() -> None:
    pipe = with_two()
    for i, module in enumerate(pipe.unet.modules()):
        if hasattr(module, "lora_A"):
            module.set_adapter(["style", "sketch"] if i % 3 else ["style"])
            module.enable_adapters(i % 4 != 1)
    before = Before(pipe)
    fastsample.accelerate(pipe)
    assert agrees(pipe, before.image) and peft_is_gone(pipe)
    fastsample.restore(pipe)
    before.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact_as_peft(dtype: torch.dtype) -> None:
    pipe = with_two()
    pipe.set_adapters(["style", "sketch"], [0.3, 0.3])
    x, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 12)

    def noise(unet: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():
            return unet(x.to(dtype), torch.tensor(500), encoder_hidden_states=tokens.to(dtype)).sample.double()

    pipe.unet.to(dtype)
    want, theirs = noise(copy.deepcopy(pipe.unet).double(), torch.float64), noise(pipe.unet, dtype)
    fastsample.accelerate(pipe)
    assert (noise(pipe.unet, dtype) - want).norm() <= 2 * (theirs - want).norm()
    fastsample.restore(pipe)
    assert torch.equal(noise(pipe.unet, dtype), theirs)


def changed(**values: Any) -> Callable[[Any], None]:
    def change(unet: Any) -> None:
        add_lora(unet)
        for module in unet.modules():
            if hasattr(module, "lora_A"):
                for name, value in values.items():
                    setattr(module, name, value)

    return change


def with_hook(unet: Any) -> None:
    add_lora(unet)
    unet.mid_block.attentions[0].proj_in.register_forward_hook(lambda *_: None)
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.register_forward_hook(lambda *_: None)


def with_infinite_scale(unet: Any) -> None:
    add_lora(unet)
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.scaling["style"] = float("inf")


def in_training(unet: Any) -> None:
    add_lora(unet, lora_dropout=0.5)
    unet.eval().mid_block.train()


def fused(unet: Any) -> None:
    add_lora(unet)
    unet.fuse_lora()


def loha(unet: Any) -> None:
    config = peft.LoHaConfig(r=2, alpha=4, target_modules=["to_q"], init_weights=False)
    unet.add_adapter(config, "style")


LEFT: dict[str, tuple[Callable[[Any], None], str, int]] = {
    "fused": (fused, "the LoRA is fused into the weights, unfuse_lora() takes it out", 16),
    "dora": (lambda unet: add_lora(unet, use_dora=True), "adapter 'style' is more than A and B: DoraLinearVariant", 16),
    "bias": (lambda unet: add_lora(unet, targets=["to_out.0"], lora_bias=True), "adapter 'style' has a bias", 4),
    "dropout": (in_training, "adapter 'style' is in training, with dropout", 8),
    "loha": (loha, "peft.tuners.loha.layer.Linear is none of PEFT's plain LoRA layers", 4),
    "hooks": (with_hook, "hooks stand around PEFT's layers", 1),
    "transposed": (changed(fan_in_fan_out=True), "adapter 'style' is for transposed weights", 16),
    "infinite": (with_infinite_scale, "adapter 'style' has the scale inf", 1),
}


@pytest.mark.parametrize("kind", LEFT)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_what_is_more_than_a_lora_is_left_to_peft(kind: str) -> None:
    pipe = stable_diffusion()
    make, reason, count = LEFT[kind]
    make(pipe.unet)
    draws = kind == "dropout"
    before = Before(pipe)
    modules = dict(pipe.unet.named_modules())
    [unet] = fastsample.accelerate(pipe).components
    left = unet.left[reason]
    assert len(left) == count and all(pipe.unet.get_submodule(path) is modules[path] for path in left)
    assert len([m for m in pipe.unet.modules() if hasattr(m, "base_layer")]) == count, "the others are moved"
    assert draws or kind == "infinite" or agrees(pipe, before.image)
    fastsample.restore(pipe)
    if not draws and kind != "infinite":
        before.check()


def test_a_lora_of_the_text_encoder_is_left_and_named() -> None:
    pipe = stable_diffusion()
    pipe.text_encoder.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "style")
    report = fastsample.accelerate(pipe)
    [reason] = report.components[0].left
    assert report.components[0].name == "text_encoder" and "it runs once an image" in reason
    assert len(report.components[0].left[reason]) == 2


@pytest.fixture
def twins() -> tuple[Any, Any]:
    """A pipeline as diffusers has it, and an accelerated one."""
    theirs, ours = (with_two() for _ in range(2))
    ours.unet.load_state_dict(theirs.unet.state_dict())
    ours.vae.load_state_dict(theirs.vae.state_dict())
    assert np.array_equal(image(theirs), image(ours))
    fastsample.accelerate(ours)
    return theirs, ours


def load(pipe: Any) -> None:
    draws, state = torch.Generator().manual_seed(3), {}
    for path, module in pipe.unet.named_modules():
        if path.endswith(("to_k", "to_k.base_layer")) and isinstance(module, nn.Linear):
            key = f"unet.{path.removesuffix('.base_layer')}"
            state[f"{key}.lora_A.weight"] = torch.randn(2, module.in_features, generator=draws)
            state[f"{key}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=draws)
    pipe.load_lora_weights(state, adapter_name="third")


METHODS: dict[str, Callable[[Any], object]] = {
    "set_adapters": lambda pipe: pipe.set_adapters(["style", "sketch"], [0.2, 0.4]),
    "disable_lora": lambda pipe: pipe.disable_lora(),
    "disable-and-enable": lambda pipe: (pipe.disable_lora(), pipe.set_adapters("style", 0.5), pipe.enable_lora()),
    "delete_adapters": lambda pipe: pipe.delete_adapters("sketch"),
    "unload_lora_weights": lambda pipe: pipe.unload_lora_weights(),
    "load_lora_weights": load,
    "fuse_lora": lambda pipe: pipe.fuse_lora(components=["unet"], lora_scale=0.5),
    "fuse-and-unfuse": lambda pipe: (pipe.fuse_lora(components=["unet"]), pipe.unfuse_lora(components=["unet"])),
}


@pytest.mark.parametrize("method", METHODS)
def test_diffusers_own_methods_go_on_working(method: str, twins: tuple[Any, Any]) -> None:
    theirs, ours = twins
    before = image(theirs)
    for pipe in twins:
        METHODS[method](pipe)
    want = image(theirs)
    assert agrees(ours, want) and (method == "fuse-and-unfuse" or not np.array_equal(want, before))
    fastsample.accelerate(ours)
    assert agrees(ours, want) and peft_is_gone(ours) == (method != "fuse_lora")
    fastsample.restore(ours)
    # The weights of a fused LoRA that was taken out again differ by their roundings.
    assert np.array_equal(image(ours), want)


def test_the_adapters_can_be_saved_from_an_accelerated_network(tmp_path: Path) -> None:
    pipe = with_two()
    pipe.unet.save_lora_adapter(tmp_path / "before", adapter_name="style")
    fastsample.accelerate(pipe)
    assert pipe.unet.active_adapters() == ["sketch"]
    pipe.unet.save_lora_adapter(tmp_path / "after", adapter_name="style")
    before, after = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("before", "after"))
    assert len(after) == 32 and before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_saved_pipeline_has_the_same_files(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    add_lora(pipe.unet)
    options = {"variant": "half", "max_shard_size": "4KB"}  # which reach the network where its method names them
    pipe.save_pretrained(tmp_path / "before", **options)
    fastsample.accelerate(pipe)
    pipe.save_pretrained(tmp_path / "after", **options)
    before, after = ({p.name: p.read_bytes() for p in (tmp_path / n / "unet").iterdir()} for n in ("before", "after"))
    assert len(before) > 3 and any(".half" in name for name in before) and after == before
    assert peft_is_gone(pipe)


@pytest.mark.parametrize("scale", ["0.5", None, [0.5]], ids=repr)
def test_a_keyword_scale_that_is_no_number(scale: object) -> None:
    pipe = stable_diffusion()
    add_lora(pipe.unet)
    fastsample.accelerate(pipe)
    before = image(pipe)
    with pytest.raises(TypeError, match="the keyword scale must be a number, got"):
        image(pipe, cross_attention_kwargs={"scale": scale})
    assert np.array_equal(image(pipe), before)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_the_keyword_scale(family: str) -> None:
    pipe = stable_diffusion() if family == "sd15" else stable_diffusion_3()
    network, keyword = (
        (pipe.unet, "cross_attention_kwargs") if family == "sd15" else (pipe.transformer, "joint_attention_kwargs")
    )
    add_lora(network)
    scaled = {scale: image(pipe, **{keyword: {"scale": scale}}) for scale in (0.5, 1.0, 2.0)}
    fastsample.accelerate(pipe)
    for scale in (0.5, 2.0, 2.0, 1.0, 0.5):
        assert np.abs(image(pipe, **{keyword: {"scale": scale}}) - scaled[scale]).max() <= NEAR
    assert np.abs(image(pipe) - scaled[1.0]).max() <= NEAR
    assert np.abs(scaled[0.5] - scaled[1.0]).max() > 2 * NEAR


def test_the_keyword_scale_multiplies_what_set_adapters_has_set() -> None:
    pipe = stable_diffusion()
    add_lora(pipe.unet)
    halved, whole = {"cross_attention_kwargs": {"scale": 0.5}}, image(pipe)
    half, quarter = image(pipe, **halved), image(pipe, cross_attention_kwargs={"scale": 0.25})
    fastsample.accelerate(pipe)
    assert np.abs(image(pipe, **halved) - half).max() <= NEAR
    lora.set_adapters(pipe.unet, {"style": 0.5})
    assert np.abs(image(pipe, **halved) - quarter).max() <= NEAR and agrees(pipe, half)
    lora.set_adapters(pipe.unet, {"style": 1.0})
    assert np.abs(image(pipe, **halved) - half).max() <= NEAR
    lora.attach(pipe.unet, lora.state_dict(pipe.unet, "style"), "again")
    lora.detach(pipe.unet, "again")
    assert agrees(pipe, whole)


def test_a_lora_attached_after_accelerate_has_to_go_first() -> None:
    pipe = stable_diffusion()
    add_lora(pipe.unet)
    before = Before(pipe)
    report = fastsample.accelerate(pipe)
    lora.attach(pipe.unet, lora.state_dict(pipe.unet, "style"), "again")
    doubled = image(pipe)
    for undo in (lambda: fastsample.restore(pipe), lambda: pipe.set_adapters("style", 0.5)):
        with pytest.raises(RuntimeError, match=r"unet has LoRAs.*after accelerate: lora\.detach\(\) 'again' first"):
            undo()
    assert fastsample.accelerate(pipe) == report
    assert np.array_equal(image(pipe), doubled) and not agrees(pipe, before.image)
    lora.detach(pipe.unet, "again")
    fastsample.restore(pipe)
    before.check()


def test_a_network_that_moves_keeps_its_lora() -> None:
    pipe = with_two()
    wide = copy.deepcopy(pipe).to(torch.float64)
    want = image(pipe)
    fastsample.accelerate(pipe)
    pipe.to(torch.float64)
    pipe.to(torch.float32)
    assert agrees(pipe, want)
    report = fastsample.accelerate(wide)
    assert list(report.components[0].left) == ["no kernel serves float64 on cpu"] and peft_is_gone(wide)
