"""The original UNet's names, and what real writers saved on its way to the module."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastsample.lora.files.sgm import sgm_names
from support.lora_files import entry, flat, read, resolve, sd, sdxl

# From the original configurations: which of their numbered blocks is which of diffusers' modules.
SD = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.1.1.proj_in": "down_blocks.0.attentions.0.proj_in",
    "input_blocks.2.1.transformer_blocks.0.attn1.to_q": "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": None,
    "input_blocks.7.0.skip_connection": "down_blocks.2.resnets.0.conv_shortcut",
    "input_blocks.8.0.emb_layers.1": "down_blocks.2.resnets.1.time_emb_proj",
    "input_blocks.9.0.op": "down_blocks.2.downsamplers.0.conv",
    "input_blocks.11.0.out_layers.3": "down_blocks.3.resnets.1.conv2",
    "input_blocks.11.1.proj_in": None,
    "middle_block.0.in_layers.2": "mid_block.resnets.0.conv1",
    "middle_block.1.transformer_blocks.0.attn2.to_k": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.0.0.skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.3.1.transformer_blocks.0.ff.net.2": "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.8.2.conv": "up_blocks.2.upsamplers.0.conv",
    "output_blocks.11.1.proj_out": "up_blocks.3.attentions.2.proj_out",
    "output_blocks.11.2.conv": None,
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "out.2": "conv_out",
}
SDXL = {
    "input_blocks.1.1.proj_in": None,
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.1.transformer_blocks.1.attn1.to_q": "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
    "input_blocks.5.1.transformer_blocks.0.attn2.to_k": "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k",
    "input_blocks.8.1.proj_out": "down_blocks.2.attentions.1.proj_out",
    "input_blocks.9.0.op": None,
    "middle_block.1.transformer_blocks.2.attn1.to_v": "mid_block.attentions.0.transformer_blocks.2.attn1.to_v",
    "output_blocks.0.1.transformer_blocks.2.ff.net.2": "up_blocks.0.attentions.0.transformer_blocks.2.ff.net.2",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.1.proj_in": "up_blocks.1.attentions.2.proj_in",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.8.0.in_layers.2": "up_blocks.2.resnets.2.conv1",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}


@pytest.mark.parametrize("is_flat", [pytest.param(True, id="kohya"), pytest.param(False, id="dots")])
@pytest.mark.parametrize(("make", "table"), [pytest.param(sd, SD, id="sd"), pytest.param(sdxl, SDXL, id="sdxl")])
def test_names_of_the_original_unet(make: Callable[[], Any], table: dict[str, str | None], is_flat: bool) -> None:
    unet = make()
    entries = {}
    for original, own in table.items():
        shape = tuple(unet.get_submodule(own).weight.shape) if own else (3, 3)
        entries[original] = entry(flat(original) if is_flat else original, shape, "unet", is_flat)
    found = resolve(unet, entries.values())
    assert set(found.entries) == {own for own in table.values() if own}
    for original, own in table.items():
        if own:
            assert found.entries[own].down is entries[original].down, original
    assert list(found.unmatched) == [entries[original].key for original, own in table.items() if own is None]


def test_every_layer_of_sdxl_has_an_original_name_that_diffusers_reads_the_same() -> None:
    peer = pytest.importorskip("diffusers.loaders.lora_conversion_utils")

    layers = {name for name, one in sdxl().named_modules() if isinstance(one, nn.Linear | nn.Conv2d)}
    originals = {original: own for original, own in sgm_names(sdxl()) if own in layers}
    assert set(originals.values()) == layers
    keys = {
        f"lora_unet_{flat(original)}.lora_{half}.weight": torch.zeros(1)
        for original in originals
        for half in ("down", "up")
    }
    mapped = peer._maybe_map_sgm_blocks_to_diffusers(dict(keys), sdxl().config)
    converted, _ = peer._convert_non_diffusers_lora_to_diffusers(mapped)
    plain = {
        key.removeprefix("unet.").replace(".processor.", ".").replace("to_out_lora", "to_out.0.lora")
        for key in converted
    }
    # diffusers leaves some of kohya's underscores where dots belong.
    assert {flat(re.split(r"[._]lora\.", key)[0]) for key in plain} == {flat(own) for own in layers}


# From a saver to a module


@pytest.mark.parametrize(
    "writer", ["save_lora_adapter", "save_lora_weights", "before-peft", "kohya", "original-names", "get_peft_model"]
)
def test_what_real_writers_saved_finds_its_module(writer: str, tmp_path: Any) -> None:
    peft, utils = pytest.importorskip("peft"), pytest.importorskip("diffusers.utils")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    unet = type(sdxl()).from_config(sdxl().config)
    plain = type(sdxl()).from_config(sdxl().config)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "net.2", "conv1", "conv_shortcut", "time_emb_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    if writer == "get_peft_model":
        adapted = peft.get_peft_model(unet, config)
        adapted.save_pretrained(tmp_path)
        source: Any = tmp_path
    else:
        unet.add_adapter(config)
        state = peft.get_peft_model_state_dict(unet)
        source = {f"unet.{key}": value for key, value in state.items()}
    if writer == "save_lora_adapter":
        unet.save_lora_adapter(tmp_path)
        source = tmp_path
    elif writer == "save_lora_weights":
        StableDiffusionLoraLoaderMixin.save_lora_weights(tmp_path, unet_lora_layers=state)
        source = tmp_path
    elif writer == "before-peft":
        source = utils.convert_state_dict_to_diffusers(source)
    elif writer in ("kohya", "original-names"):
        source = utils.convert_state_dict_to_kohya(source)
    if writer == "original-names":
        originals = {flat(own): flat(original) for original, own in sgm_names(plain)}
        source = {
            f"lora_unet_{originals[key.removeprefix('lora_unet_').split('.')[0]]}.{key.split('.', 1)[1]}": value
            for key, value in source.items()
        }
        assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in source
    found = resolve(plain, read(source))
    expected = {
        name.removeprefix("base_model.model."): (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in unet.named_modules()
        if hasattr(layer, "scaling")
    }
    assert set(found.entries) == set(expected) and len(expected) > 100
    for name, (down, up) in expected.items():
        assert torch.equal(found.entries[name].down, down) and torch.equal(found.entries[name].up, up), name
        assert found.entries[name].factor == 1.0
    assert not found.unmatched and not found.elsewhere
