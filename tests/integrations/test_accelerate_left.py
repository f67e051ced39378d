"""What accelerate leaves and names, and projections that are not called one after the other on one tensor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import accelerate as hf_accelerate
import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor, nn

import fastsample
from fastsample import lora
from fastsample.integrations import diffusers as schedulers
from fastsample.integrations.acceleration.projections import SharedLinears, shared_layers
from support.small_pipelines import NEAR, WIDTH, Before, add_lora, image, stable_diffusion

pytestmark = [
    pytest.mark.usefixtures("one_thread_and_seed"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


class OwnProcessor(AttnProcessor2_0):
    """Of a user, who may call what he likes."""


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def with_linear_of_its_own(pipe: Any) -> None:
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    block.to_v = OwnLinear(block.to_v.in_features, block.to_v.out_features, bias=False)


class OwnAttention(nn.Module):
    """That needs no processor."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, **_: object) -> Tensor:
        return self.to_q(x) * self.to_k(x).sigmoid() + self.to_v(x)


def with_attention_of_its_own(pipe: Any) -> None:
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1 = OwnAttention()


def attached(pipe: Any) -> None:
    down, up = torch.ones(2, 8, 1, 1), torch.ones(8, 2, 1, 1)
    name = "mid_block.attentions.0.proj_in"
    lora.attach(pipe.unet, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})


def compiled_inside(pipe: Any) -> None:
    pipe.unet.mid_block.compile(backend="eager")


def compiled_around(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def wrapped(pipe: Any) -> None:
    pipe.unet = peft.get_peft_model(pipe.unet, peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False))


def quantized(pipe: Any) -> None:
    pipe.unet.is_quantized = True


def offloaded(pipe: Any) -> None:
    hf_accelerate.cpu_offload(pipe.unet, execution_device="cpu")


def offloaded_as_a_whole(pipe: Any) -> None:
    hf_accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")


def cast(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


# What the user has done, why what is left, and how many projections still run as one.
LEFT: dict[str, tuple[Callable[[Any], None], str, int]] = {
    "processor": (
        lambda pipe: pipe.unet.set_attn_processor(OwnProcessor()),
        "the attention processor OwnProcessor is not one of diffusers'",
        0,
    ),
    "fused": (
        lambda pipe: pipe.fuse_qkv_projections(),
        "fuse_qkv_projections() has fused the projections already",
        0,
    ),
    "linear": (with_linear_of_its_own, "a projection: its forward is not Linear's own", 3),
    "attention": (with_attention_of_its_own, "attention without a processor of diffusers", 3),
    "attached": (attached, "it has layers of fastsample.lora already", 0),
    "compiled-inside": (compiled_inside, "it is compiled, accelerate comes before torch.compile", 0),
    "compiled-around": (compiled_around, "it is compiled, accelerate comes before torch.compile", 0),
    "peft-model": (wrapped, "a PeftModel is around it: its get_base_model() can be accelerated", 0),
    "quantized": (quantized, "its weights are quantized", 0),
    "offloaded": (offloaded, "hooks of accelerate or diffusers move or cast its weights", 0),
    "offloaded-whole": (offloaded_as_a_whole, "hooks of accelerate or diffusers move or cast its weights", 0),
    "cast": (cast, "hooks of accelerate or diffusers move or cast its weights", 0),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_is_named(kind: str) -> None:
    pipe = stable_diffusion()
    change, reason, fused = LEFT[kind]
    change(pipe)
    runs = not kind.startswith("compiled")  # compiling takes its time
    before = image(pipe) if runs else None
    modules = [id(module) for module in pipe.unet.modules()]
    [unet] = fastsample.accelerate(pipe).components
    assert reason in unet.left and len(unet.fused) == fused
    assert f"unet: left: {reason}" in repr(fastsample.accelerate(pipe))
    assert fused or [id(module) for module in pipe.unet.modules()] == modules
    assert before is None or np.abs(image(pipe) - before).max() <= NEAR
    fastsample.restore(pipe)
    assert [id(module) for module in pipe.unet.modules()] == modules
    assert before is None or np.array_equal(image(pipe), before)


def test_processors_with_projections_of_their_own() -> None:
    """IP-Adapter's cut the context into text and picture, and project the picture by themselves."""
    pipe = stable_diffusion()
    pictures = {"hidden_size": 8, "cross_attention_dim": WIDTH, "num_tokens": (4,)}
    processors = {
        name: IPAdapterAttnProcessor2_0(**pictures) if "attn2" in name else AttnProcessor2_0()
        for name in pipe.unet.attn_processors
    }
    pipe.unet.set_attn_processor(processors)
    add_lora(pipe.unet)
    x, text, picture = torch.randn(2, 4, 8, 8), torch.randn(2, 7, WIDTH), torch.randn(2, 1, 4, WIDTH)
    with torch.no_grad():
        want = pipe.unet(x, 10, (text, [picture])).sample
        assert (pipe.unet(x, 10, (text, [-picture])).sample - want).abs().max() > 0.01
        [unet] = fastsample.accelerate(pipe).components
        assert len(unet.fused) == 4 and not unet.left
        torch.testing.assert_close(pipe.unet(x, 10, (text, [picture])).sample, want, rtol=1e-4, atol=1e-4)
        fastsample.restore(pipe)
        assert torch.equal(pipe.unet(x, 10, (text, [picture])).sample, want)


class OwnScheduler(diffusers.DDIMScheduler):
    """Of a user."""


def uncovered(*_: object) -> None:
    raise ValueError("option 'rescale' is not covered")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (partial(diffusers.PNDMScheduler, skip_prk_steps=True), "left: fastsample has no PNDMScheduler"),
        (OwnScheduler, "left: fastsample has no OwnScheduler"),
        (schedulers.DDIMScheduler, "DDIMScheduler is fastsample's already"),
    ],
    ids=["no-equivalent", "own", "ours"],
)
def test_schedulers_that_stay(make: Any, sentence: str) -> None:
    pipe = stable_diffusion()
    pipe.scheduler = make()
    before = Before(pipe)
    report = fastsample.accelerate(pipe)
    assert (report.swapped, report.scheduler) == (False, sentence) and pipe.scheduler is not None
    fastsample.restore(pipe)
    before.check()


def test_an_option_that_is_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = stable_diffusion()
    monkeypatch.setattr(schedulers, "same_as", uncovered)
    report = fastsample.accelerate(pipe)
    assert not report.swapped and report.scheduler == "left: DDIMScheduler: option 'rescale' is not covered"
    assert type(pipe.scheduler) is diffusers.DDIMScheduler and len(report.components[0].fused) == 4


def test_a_pipeline_without_a_scheduler() -> None:
    pipe = stable_diffusion()
    pipe.scheduler = None
    assert fastsample.accelerate(pipe).scheduler == "the pipeline has none"
    fastsample.restore(pipe)
    assert pipe.scheduler is None


# What a user does after accelerate.
AFTERWARDS: dict[str, Callable[[Any], object]] = {
    "sliced": lambda pipe: pipe.unet.set_attn_processor(SlicedAttnProcessor(2)),
    "default": lambda pipe: pipe.unet.set_default_attn_processor(),
    "own": lambda pipe: pipe.unet.set_attn_processor(OwnProcessor()),
    "fused": lambda pipe: pipe.fuse_qkv_projections(),
    "fused-and-unfused": lambda pipe: (pipe.fuse_qkv_projections(), pipe.unfuse_qkv_projections()),
    "offloaded": offloaded,
    "cast": cast,
}


@pytest.mark.parametrize("change", AFTERWARDS)
def test_what_comes_afterwards_computes_the_same(change: str) -> None:
    pipe, plain = stable_diffusion(), None
    if change != "fused":
        add_lora(pipe.unet)
    if change == "cast":
        pipe.unet.to(torch.bfloat16).to(torch.float32)  # what the cast does to weights
        plain = image(pipe)
    before = image(pipe) if plain is None else plain
    fastsample.accelerate(pipe)
    AFTERWARDS[change](pipe)
    # Casting leaves the factors as they are, but norms are cast too.
    assert np.abs(image(pipe) - before).max() <= (10 * NEAR if change == "cast" else NEAR)
    if change not in ("fused", "cast", "offloaded"):
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        fastsample.restore(pipe)
        assert np.array_equal(image(pipe), before)


def shared(count: int = 3, into: int = 5) -> tuple[list[nn.Linear], list[Any], SharedLinears]:
    linears = [nn.Linear(into, 4 + i) for i in range(count)]
    layers = shared_layers(linears)
    frozen = layers[0]._frozen
    assert isinstance(frozen, SharedLinears)
    return linears, layers, frozen


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2), (0, 0, 1, 2), (0, 1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference"])
def test_every_order_of_calls_is_right(order: tuple[int, ...], inference: bool) -> None:
    linears, layers, _ = shared()
    with torch.inference_mode() if inference else torch.no_grad():
        for x in torch.randn(4, 7, 5):
            for i in order:
                torch.testing.assert_close(layers[i](x), linears[i](x), rtol=1e-5, atol=1e-6)


def test_another_input_is_another_result() -> None:
    linears, layers, frozen = shared()
    x, y = torch.randn(2, 7, 5)
    with torch.no_grad():
        layers[0](x)
        torch.testing.assert_close(layers[1](y), linears[1](y))
        torch.testing.assert_close(layers[2](x), linears[2](x))
        x += 1
        torch.testing.assert_close(layers[1](x), linears[1](x))
        assert not frozen._left_over


def test_threads_get_their_own_results() -> None:
    linears, layers, _ = shared()
    both = Barrier(2, timeout=60)

    def outputs(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            first = layers[0](x)
            both.wait()  # the others are called when both threads have called the first
            return [first, layers[1](x), layers[2](x)]

    inputs = list(torch.randn(2, 7, 5))
    with ThreadPoolExecutor(2) as pool:
        for x, made in zip(inputs, pool.map(outputs, inputs), strict=True):
            torch.testing.assert_close(made, [linear(x) for linear in linears])


def test_what_nobody_asks_for_is_no_longer_computed() -> None:
    linears, layers, frozen = shared()
    with torch.no_grad():
        for x in torch.randn(5, 7, 5):
            for layer, linear, tensor in zip(layers, linears, (x, x + 1, x + 1), strict=True):
                torch.testing.assert_close(layer(tensor), linear(tensor))
    assert frozen._left_over == 3 and frozen._unclaimed is None


def test_outputs_are_kept_until_they_are_asked_for() -> None:
    _, layers, frozen = shared()
    x = torch.randn(7, 5)
    with torch.no_grad():
        layers[0](x)
        layers[2](x)
        assert frozen._unclaimed is not None
        layers[1](x)
    assert frozen._unclaimed is None


def test_other_adapters_between_two_calls_count() -> None:
    linears, layers, _ = shared(2)
    x = torch.randn(7, 5)
    with torch.no_grad():
        layers[0](x)
        down, up = torch.randn(2, 5), torch.randn(5, 2)
        layers[1].add_adapter("style", [None, (down, up)])
        torch.testing.assert_close(layers[1](x), linears[1](x) + x @ down.T @ up.T)


def test_gradients_reach_the_input() -> None:
    linears, layers, _ = shared()
    x, y = (torch.randn(7, 5).requires_grad_() for _ in range(2))
    y.data = x.data.clone()
    sum((layer(x) ** 2).sum() for layer in layers).backward()
    sum((linear(y) ** 2).sum() for linear in linears).backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad)
