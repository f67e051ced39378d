"""Whole models of diffusers and transformers with a file attached: equal to PEFT's, or as exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsample import lora
from support.lora_modules import small_unet

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


def clip() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    config = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
        eos_token_id=49,
    )
    tokens = torch.randint(0, 49, (3, 9))
    return transformers.CLIPTextModel(config), lambda model: model(tokens).last_hidden_state


def sd3() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        in_channels=4,
        out_channels=4,
        pos_embed_max_size=8,
    )
    x, context, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.randn(2, 10)

    def call(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        given = [one.to(dtype) for one in (x, context, pooled)]
        return model(*given, torch.tensor([3, 700])).sample

    return model, call


CLIP = "q_proj k_proj v_proj out_proj fc1 fc2"
SD3 = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out proj net.2 linear_1 context_embedder"


@pytest.mark.parametrize(
    ("make", "targets", "options"),
    [(clip, CLIP, {}), (clip, CLIP, {"use_rslora": True}), (sd3, SD3, {})],
    ids=["clip", "clip-rslora", "sd3"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_equals_peft(make: Any, targets: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    ours, call = make()
    ours.eval().requires_grad_(False)
    plain = copy.deepcopy(ours).to(dtype)
    config = peft.LoraConfig(r=4, lora_alpha=5, target_modules=targets.split(), init_lora_weights=False, **options)
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    theirs.save_pretrained(tmp_path)
    report = lora.attach(ours.to(dtype), tmp_path)
    adapted = sum(isinstance(part, peft.tuners.lora.LoraLayer) for part in theirs.modules())
    assert (len(report.matched), report.unmatched, report.elsewhere) == (adapted, (), ())
    theirs = theirs.base_model.model.to(dtype)
    with torch.no_grad():
        want = call(copy.deepcopy(theirs).double())
        error, own = (call(theirs) - want).norm(), (call(ours) - want).norm()
        assert own <= 2 * error
        assert (call(plain) - want).norm() > 5 * own, "the adapter must matter"


def test_lcm_lora_by_the_keys_of_its_file(tmp_path: Path) -> None:
    unet = small_unet()
    block, state = "down_blocks_0_attentions_0_transformer_blocks_0", {}
    for key, name in {
        f"{block}_attn1_to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        f"{block}_attn2_to_out_0": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
        f"{block}_ff_net_0_proj": "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "down_blocks_0_attentions_0_proj_in": "down_blocks.0.attentions.0.proj_in",
        "down_blocks_0_downsamplers_0_conv": "down_blocks.0.downsamplers.0.conv",
        "down_blocks_1_resnets_0_conv_shortcut": "down_blocks.1.resnets.0.conv_shortcut",
        "mid_block_resnets_1_time_emb_proj": "mid_block.resnets.1.time_emb_proj",
        "up_blocks_0_upsamplers_0_conv": "up_blocks.0.upsamplers.0.conv",
        "conv_in": "conv_in",
        "time_embedding_linear_1": "time_embedding.linear_1",
    }.items():
        out, into, *kernel = unet.get_submodule(name).weight.shape
        state[f"lora_unet_{key}.lora_down.weight"] = torch.randn(2, into, *kernel)
        state[f"lora_unet_{key}.lora_up.weight"] = torch.randn(out, 2, *(1 for _ in kernel))
        state[f"lora_unet_{key}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    report = lora.attach(unet, tmp_path)
    assert {f"lora_unet_{name.replace('.', '_')}" for name in report.matched} == {key.split(".")[0] for key in state}
    assert all(layer.adapters == ("default",) for layer in map(unet.get_submodule, report.matched))
    kept = lora.state_dict(unet)
    for name in report.matched:
        up = state[f"lora_unet_{name.replace('.', '_')}.lora_up.weight"]
        assert torch.equal(kept[f"{name}.lora_B.weight"], up / 2), "alpha / r is in B"
