"""diffusers' attention with fused projections: equal to its own processors, and whole UNets equal to PEFT."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import Tensor, nn

from fastsample import lora
from fastsample.lora import LoRALinear
from fastsample.lora.layers.attention import FusedAttnProcessor
from support.lora_modules import small_unet

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

State = dict[str, Tensor]


def factors(block: nn.Module, names: str = "to_q to_k to_v to_out.0", rank: int = 2) -> State:
    state = {}
    for name in names.split():
        linear = block.get_submodule(name)
        state[f"{name}.lora_A.weight"] = torch.randn(rank, linear.in_features) / 4
        state[f"{name}.lora_B.weight"] = torch.randn(linear.out_features, rank) / 4
    return state


def attention(**options: Any) -> Attention:
    return Attention(**{"query_dim": 16, "heads": 2, "dim_head": 8, **options}).eval().requires_grad_(False)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape)


CONTEXT = dict(cross_attention_dim=12)
IMAGE = dict(norm_num_groups=4, residual_connection=True, rescale_output_factor=2.0, bias=True)
# The block's options, and what it is called with.
BLOCKS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "self": ({}, dict),
    "self-bias-scaled": (dict(bias=True, rescale_output_factor=1.5, residual_connection=True), dict),
    "self-mask": ({}, lambda: dict(attention_mask=torch.randn(3, 1, 10))),
    "self-mask-per-head": ({}, lambda: dict(attention_mask=torch.randn(6, 1, 10))),
    "self-with-context": ({}, lambda: dict(encoder_hidden_states=tokens(3, 7, 16))),
    "self-image": (IMAGE, lambda: dict(hidden_states=tokens(3, 16, 2, 5))),
    "self-spatial-norm": (
        dict(query_dim=32, spatial_norm_dim=4),
        lambda: dict(hidden_states=tokens(3, 32, 2, 5), temb=tokens(3, 4, 1, 1)),
    ),
    "qk-norm": (dict(qk_norm="rms_norm"), dict),
    "cross": (CONTEXT, lambda: dict(encoder_hidden_states=tokens(3, 7, 12))),
    "cross-mask": (
        CONTEXT,
        lambda: dict(encoder_hidden_states=tokens(3, 7, 12), attention_mask=torch.randn(3, 1, 7)),
    ),
    "cross-layer-norm": (
        CONTEXT | dict(cross_attention_norm="layer_norm"),
        lambda: dict(encoder_hidden_states=tokens(3, 7, 12)),
    ),
    "cross-group-norm": (
        CONTEXT | dict(cross_attention_norm="group_norm", cross_attention_norm_num_groups=3),
        lambda: dict(encoder_hidden_states=tokens(3, 7, 12)),
    ),
    "cross-without-context": (dict(cross_attention_dim=16), dict),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0], ids=lambda p: p.__name__)
def test_equals_the_blocks_own_processor(name: str, processor: type) -> None:
    options, inputs = BLOCKS[name]
    block, single = (attention(**options) for _ in range(2))
    single.load_state_dict(block.state_dict())
    for one in (block, single):
        one.set_processor(processor())
    state = factors(block)
    lora.attach(block, state)
    lora.attach(single, state, fuse=False)
    fused = name != "qk-norm" or processor is AttnProcessor2_0
    assert type(block.processor) is (FusedAttnProcessor if fused else processor)
    assert type(single.processor) is processor
    given = {"hidden_states": tokens(3, 10, 16), **inputs()}
    want = single(**given)
    # Magnitudes near 1, sums of some 20 terms, and a softmax in another order.
    torch.testing.assert_close(block(**given), want, rtol=1e-5, atol=1e-5)
    lora.set_adapters(block, {})
    assert not torch.allclose(block(**given), want, atol=1e-2)


def unfused(**changes: Any) -> Attention:
    block = attention()
    for name, value in changes.items():
        setattr(block, name, value)
    return block


UNKNOWN: dict[str, Callable[[], Attention]] = {
    "added-kv": lambda: attention(added_kv_proj_dim=12, processor=AttnProcessor2_0()),
    "sliced": lambda: attention(processor=SlicedAttnProcessor(1)),
    "upcast": lambda: attention(upcast_attention=True, processor=AttnProcessor()),
    "unscaled": lambda: attention(scale_qk=False),
    "own": lambda: attention(processor=lambda attn, x, **_: attn.to_out[0](attn.to_q(x))),
    "half-k": lambda: unfused(to_k=nn.Linear(16, 16, bias=False).half()),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_blocks_keep_their_processor(name: str) -> None:
    block = UNKNOWN[name]()
    before = block.processor
    lora.attach(block, factors(block))
    assert block.processor is before
    assert all(type(block.get_submodule(part)) is LoRALinear for part in ("to_q", "to_k", "to_v", "to_out.0"))
    assert len({id(block.get_submodule(part)._frozen) for part in ("to_q", "to_k", "to_v")}) == 3


@pytest.mark.parametrize(
    ("names", "options", "fused", "single"),
    [
        ("to_q", {}, "to_q to_k to_v", ""),
        ("to_v to_out.0", {}, "to_q to_k to_v", "to_out.0"),
        ("to_out.0", {}, "", "to_out.0"),
        ("to_q", CONTEXT, "", "to_q"),
        ("to_q to_v", CONTEXT, "to_k to_v", "to_q"),
    ],
    ids=["q", "v-out", "out", "cross-q", "cross-q-v"],
)
def test_untouched_projections_join_without_an_adapter(names: str, options: Any, fused: str, single: str) -> None:
    block = attention(**options)
    context = dict(encoder_hidden_states=tokens(3, 7, 12)) if options else {}
    state, x, processor = factors(block, names), tokens(3, 10, 16), block.processor
    before, originals = copy.deepcopy(block), dict(block.named_modules())
    lora.attach(before, state, fuse=False)
    report = lora.attach(block, state)
    assert report.matched == tuple(names.split())
    adapted = {name for name, part in block.named_modules() if isinstance(part, LoRALinear)}
    assert adapted == {*fused.split(), *single.split()}
    assert len({id(block.get_submodule(name)._frozen) for name in fused.split()}) == bool(fused)
    torch.testing.assert_close(block(x, **context), before(x, **context), rtol=1e-5, atol=1e-5)
    assert block.processor is processor or block.processor.original is processor
    lora.attach(block, factors(block), "more")
    lora.detach(block, "more")
    torch.testing.assert_close(block(x, **context), before(x, **context), rtol=1e-5, atol=1e-5)
    lora.detach(block)
    assert block.processor is processor
    assert dict(block.named_modules()) == originals


def test_two_files_make_one_projection() -> None:
    block, single = attention(**CONTEXT), attention(**CONTEXT)
    single.load_state_dict(block.state_dict())
    x, context = tokens(3, 10, 16), tokens(3, 7, 12)
    for names in ("to_q", "to_v", "to_k to_out.0"):
        state = factors(block, names)
        lora.attach(block, state, names)
        lora.attach(single, state, names, fuse=False)
        torch.testing.assert_close(block(x, context), single(x, context), rtol=1e-5, atol=1e-5)
    assert type(block.processor) is FusedAttnProcessor
    assert block.to_k._frozen is block.to_v._frozen is not block.to_q._frozen


@pytest.mark.parametrize("keep_weight", [True, False], ids=["kept", "released"])
def test_what_others_do_to_the_projections_counts(keep_weight: bool) -> None:
    block, x = attention(), tokens(3, 10, 16)
    lora.attach(block, factors(block), keep_weight=keep_weight)
    want, calls = block(x), list[str]()
    hook = block.to_v.register_forward_hook(lambda *_: calls.append("v"))
    torch.testing.assert_close(block(x), want, rtol=1e-5, atol=1e-5)
    assert calls == ["v"]
    hook.remove()
    block.to_v, before = nn.Identity(), block.to_v
    assert not torch.allclose(block(x), want, atol=1e-2)
    block.to_v = before
    assert torch.equal(block(x), want)
    block.set_processor(AttnProcessor2_0())
    torch.testing.assert_close(block(x), want, rtol=1e-5, atol=1e-5)
    lora.detach(block)
    assert type(block.processor) is AttnProcessor2_0


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "single"])
def test_diffusers_cannot_fuse_what_is_attached(fuse: bool) -> None:
    block = attention()
    lora.attach(block, factors(block), fuse=fuse)
    for one in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        with pytest.raises(RuntimeError, match=r"detach\(\) them first"):
            one.fuse_projections(fuse=True)
        lora.detach(one)
        one.fuse_projections(fuse=True)
        assert one.fused_projections


def test_a_processor_made_of_the_class_alone() -> None:
    block, x = attention(), tokens(3, 10, 16)
    lora.attach(block, factors(block))
    want = block(x)
    # So does load_ip_adapter with the processors of self-attention.
    block.set_processor(block.processor.__class__())
    torch.testing.assert_close(block(x), want, rtol=1e-5, atol=1e-5)
    lora.detach(block)
    assert type(block.processor) is AttnProcessor2_0


def test_dropout_of_the_block_runs() -> None:
    block, x = attention(dropout=0.5).train(), tokens(3, 10, 16)
    lora.attach(block, factors(block))
    assert not torch.equal(block(x), block(x))


def test_a_compiled_block_takes_another_file(compiler: Any) -> None:
    block, x = attention(), tokens(3, 10, 16)
    lora.attach(block, factors(block), capacity=4)
    compiled = torch.compile(block, backend=compiler, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)
        lora.swap(block, factors(block, "to_q to_v", rank=4), scale=2.0)
        lora.set_adapters(block, {"default": 0.5})
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)
    assert compiler.frame_count == 1


# Whole UNets


@pytest.fixture(scope="module")
def template() -> diffusers.UNet2DConditionModel:
    torch.manual_seed(1)
    return small_unet().eval()


@pytest.fixture
def unet(template: diffusers.UNet2DConditionModel) -> diffusers.UNet2DConditionModel:
    return copy.deepcopy(template).requires_grad_(False)


def predict(unet: nn.Module, batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 4, 8, 8, generator=noise).to(dtype)
    context = torch.randn(batch, 7, 12, generator=noise).to(dtype)
    with torch.no_grad():
        return unet(x, torch.arange(batch) * 100, encoder_hidden_states=context).sample


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj"]


def adapter(unet: diffusers.UNet2DConditionModel, targets: list[str], rank: int = 4, alpha: float = 5) -> nn.Module:
    """The UNet with PEFT's layers."""
    theirs = copy.deepcopy(unet)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    theirs.add_adapter(config)
    return theirs


@pytest.mark.parametrize("targets", [ATTENTION, ["to_k"], EVERYTHING], ids=["attention", "k", "everything"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_unet_equals_peft(
    unet: diffusers.UNet2DConditionModel, targets: list[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = adapter(unet, targets)
    theirs.save_lora_adapter(tmp_path)
    unet.to(dtype)
    report = lora.attach(unet, tmp_path)
    adapted = {name for name, part in theirs.named_modules() if isinstance(part, peft.tuners.lora.LoraLayer)}
    assert (set(report.matched), report.unmatched, report.elsewhere) == (adapted, (), ())
    fused = [part for part in unet.attn_processors.values() if isinstance(part, FusedAttnProcessor)]
    assert len(fused) == len(unet.attn_processors)
    # Of the factors as they are rounded to the UNet's dtype.
    theirs.to(dtype)
    want = predict(copy.deepcopy(theirs).double(), dtype=torch.float64)
    # float64's error is float32's, scaled by the unit roundoffs.
    measured = torch.float32 if dtype == torch.float64 else dtype
    allowed = 2 * (predict(theirs.to(measured), dtype=measured) - want).norm()
    allowed *= torch.finfo(dtype).eps / torch.finfo(measured).eps
    assert (predict(unet, dtype=dtype) - want).norm() <= allowed


@pytest.mark.parametrize("keep_weight", [True, False], ids=["kept", "released"])
def test_unet_is_the_same_after_detach(unet: diffusers.UNet2DConditionModel, keep_weight: bool, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    modules, processors, want = dict(unet.named_modules()), unet.attn_processors, predict(unet)
    adapter(unet, EVERYTHING).save_lora_adapter(tmp_path)
    lora.attach(unet, tmp_path, keep_weight=keep_weight)
    file = io.BytesIO()
    torch.save(unet, file)
    file.seek(0)
    attached = predict(unet)
    for twin in (copy.deepcopy(unet), torch.load(file, weights_only=False)):
        assert torch.equal(predict(twin), attached)
        assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())
        lora.detach(twin)
        assert torch.equal(predict(twin), want)
    assert torch.equal(predict(unet), attached)
    assert list(unet.state_dict()) == list(state)
    unet.bfloat16()
    assert predict(unet, dtype=torch.bfloat16).dtype == torch.bfloat16
    unet.float().load_state_dict(state)
    assert torch.equal(predict(unet), attached)
    lora.detach(unet)
    assert dict(unet.named_modules()) == modules
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert torch.equal(predict(unet), want)


def test_unet_gives_each_sample_its_adapter(unet: diffusers.UNet2DConditionModel, tmp_path: Path) -> None:
    plain = copy.deepcopy(unet)
    for name, targets in {"all": EVERYTHING, "some": ["to_q", "conv1"], "v": ["to_v", "proj_in"]}.items():
        adapter(plain, targets).save_lora_adapter(tmp_path / name)
        lora.attach(unet, tmp_path / name, name)
    lora.set_adapter_index(unet, torch.tensor([2, 0, -1, 1]))
    together = predict(unet)
    lora.set_adapter_index(unet, None)
    for sample, name in enumerate(["v", "all", None, "some"]):
        lora.set_adapters(unet, {} if name is None else {name: 1.0})
        alone = predict(unet)[sample]
        torch.testing.assert_close(together[sample], alone, rtol=0, atol=1e-4 * alone.abs().max().item())


def test_imports_without_diffusers() -> None:
    code = "import sys, fastsample.lora; assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
