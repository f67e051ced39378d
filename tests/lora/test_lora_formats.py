"""LoRA files as their writers write them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from support.lora_files import DOWN, PEFT, UP, assert_equal, layers, peft_model, read

PATTERNS = {"rank_pattern": {"q": 3, "block.conv": 5}, "alpha_pattern": {"block.q": 7, "k": 2}}


# PEFT


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"r": 4}, id="alpha-default"),
        pytest.param({"r": 4, "lora_alpha": 6}, id="alpha"),
        pytest.param({"r": 4, "lora_alpha": 0}, id="alpha-0-is-0-in-peft"),
        pytest.param({"r": 4, "lora_alpha": 6, "use_rslora": True}, id="rslora"),
        pytest.param({"r": 4, "lora_alpha": 6, **PATTERNS}, id="patterns"),
        pytest.param({"r": 4, "lora_alpha": 6, "use_rslora": True, **PATTERNS}, id="rslora-patterns"),
    ],
)
@pytest.mark.parametrize("safe", [pytest.param(True, id="safetensors"), pytest.param(False, id="bin")])
def test_peft_folder_and_file(config: dict[str, Any], safe: bool, tmp_path: Path) -> None:
    model = peft_model(**config)
    if not config.get("lora_alpha", 1):
        assert {factor for *_, factor in layers(model).values()} == {0.0}
    model.save_pretrained(tmp_path, safe_serialization=safe)
    assert_equal(read(tmp_path), layers(model))
    name = f"adapter_model.{'safetensors' if safe else 'bin'}"
    assert_equal(read(os.fspath(tmp_path / name)), layers(model))


def test_peft_state_dicts_with_and_without_the_adapters_name() -> None:
    peft = pytest.importorskip("peft")
    model = peft_model(r=4, lora_alpha=4)
    assert_equal(read(peft.get_peft_model_state_dict(model)), layers(model))
    named = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    assert any(".lora_A.default.weight" in key for key in named)
    assert_equal(read(named), layers(model))
    model.add_adapter("second", model.peft_config["default"])
    with pytest.raises(ValueError, match=r"several adapters: .*lora_A\.default\.weight.*lora_A\.second\.weight"):
        read({key: value for key, value in model.state_dict().items() if "lora_" in key})


def test_peft_patterns_are_regular_expressions_and_the_first_match_counts(tmp_path: Path) -> None:
    model = peft_model(r=4, lora_alpha=6, alpha_pattern={"^q": 1, r".*\.q": 2, "block.*": 3, "q": 5})
    model.save_pretrained(tmp_path)
    factors = {entry.path: entry.factor * 4 for entry in read(tmp_path)}
    assert factors == {"q": 1, "k": 6, "block.q": 2, "block.conv": 3, "block.point": 3}
    assert_equal(read(tmp_path), layers(model))


# diffusers


@pytest.fixture(scope="module")
def unet() -> Any:
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    model.add_adapter(
        peft.LoraConfig(
            r=4,
            lora_alpha=3,
            init_lora_weights=False,
            target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1"],
            rank_pattern={"attn2.to_k": 2},
            alpha_pattern={"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 9},
        )
    )
    return model


@pytest.fixture(scope="module")
def text_encoder() -> Any:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=20,
            bos_token_id=0,
            eos_token_id=1,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=7,
        )
    )
    config = peft.LoraConfig(
        r=3, lora_alpha=5, init_lora_weights=False, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
    )
    model.add_adapter(config)
    return model


def ones(expected: dict[str, tuple[Tensor, Tensor, float]]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A writer without alpha: diffusers and PEFT then take the rank for it."""
    return {name: (down, up, 1.0) for name, (down, up, _) in expected.items()}


@pytest.mark.parametrize("target", [pytest.param("folder", id="folder"), pytest.param("file", id="file")])
def test_a_models_own_saver(unet: Any, target: str, tmp_path: Path) -> None:
    unet.save_lora_adapter(tmp_path)
    path = tmp_path if target == "folder" else tmp_path / "pytorch_lora_weights.safetensors"
    assert_equal(read(path), layers(unet))
    assert len({factor for *_, factor in layers(unet).values()}) == 3, "rank and alpha patterns are in the file"


@pytest.mark.parametrize(
    ("alphas", "safe"),
    [
        pytest.param(True, True, id="metadata"),
        pytest.param(False, True, id="no-alpha"),
        pytest.param(False, False, id="bin"),
    ],
)
def test_a_pipelines_saver(unet: Any, text_encoder: Any, alphas: bool, safe: bool, tmp_path: Path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    StableDiffusionLoraLoaderMixin.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        text_encoder_lora_layers=get_peft_model_state_dict(text_encoder),
        safe_serialization=safe,
        **(_collate_lora_metadata({"unet": unet, "text_encoder": text_encoder}) if alphas else {}),
    )
    entries = read(tmp_path)
    for component, model in (("unet", unet), ("text_encoder", text_encoder)):
        assert_equal(entries, layers(model) if alphas else ones(layers(model)), component)


def test_diffusers_keys_before_peft(unet: Any, text_encoder: Any) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    states = {
        "unet": convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
        "text_encoder": convert_state_dict_to_diffusers(get_peft_model_state_dict(text_encoder)),
    }
    state = {f"{component}.{key}": value for component, part in states.items() for key, value in part.items()}
    assert any(key.endswith(".to_q.lora.down.weight") for key in state)
    assert any(key.endswith(".q_proj.lora_linear_layer.up.weight") for key in state)
    entries = read(state)
    assert_equal(entries, ones(layers(unet)), "unet")
    assert_equal(entries, ones(layers(text_encoder)), "text_encoder")


@pytest.mark.parametrize(
    ("stem", "component", "path"),
    [
        pytest.param("down.attn1.processor.to_q_lora", "", "down.attn1.to_q", id="attn_procs"),
        pytest.param("unet.down.attn2.processor.to_out_lora", "unet", "down.attn2.to_out.0", id="to_out"),
        pytest.param("unet.down.attn2.processor.add_k_proj_lora", "unet", "down.attn2.add_k_proj", id="added"),
        pytest.param("unet.down.attn1.to_q.lora", "unet", "down.attn1.to_q", id="lora"),
        pytest.param("unet.down.attn1.processor.to_q.lora", "unet", "down.attn1.to_q", id="processor-lora"),
        pytest.param("unet.down.proj_in.lora", "unet", "down.proj_in", id="proj_in"),
        pytest.param("transformer.blocks.0.attn.to_k.lora", "transformer", "blocks.0.attn.to_k", id="transformer"),
        pytest.param(
            "text_encoder.layers.0.self_attn.to_q_lora", "text_encoder", "layers.0.self_attn.q_proj", id="te-q"
        ),
        pytest.param("text_encoder.l.self_attn.to_out_lora", "text_encoder", "l.self_attn.out_proj", id="te-out"),
        pytest.param("text_encoder_2.l.mlp.fc1.lora_linear_layer", "text_encoder_2", "l.mlp.fc1", id="te2-mlp"),
    ],
)
@pytest.mark.parametrize("alpha", [pytest.param(None, id="rank"), pytest.param(3.0, id="alpha")])
def test_older_diffusers_keys(stem: str, component: str, path: str, alpha: float | None) -> None:
    state = {f"{stem}.down.weight": DOWN, f"{stem}.up.weight": UP}
    if alpha is not None:
        state[f"{stem}.alpha"] = torch.tensor(alpha)
    assert_equal(read(state), {path: (DOWN, UP, 1.0 if alpha is None else 1.5)}, component)


@pytest.mark.parametrize(
    ("stem", "component", "path"),
    [
        pytest.param("base_model.model.unet.a.b", "unet", "a.b", id="peft-unet"),
        pytest.param("unet.base_model.model.a.b", "unet", "a.b", id="unet-peft"),
        pytest.param("diffusion_model.a.b", "", "a.b", id="comfy"),
        pytest.param("model.diffusion_model.a.b", "", "a.b", id="ldm"),
        pytest.param("text_encoder_3.a", "text_encoder_3", "a", id="t5"),
        pytest.param("text_encoder_22.a", "", "text_encoder_22.a", id="no-component"),
        pytest.param("unet", "", "unet", id="a-layer-of-that-name"),
        pytest.param("unet.unet.a", "unet", "unet.a", id="a-child-of-that-name"),
        pytest.param("a.processor.b", "", "a.processor.b", id="a-module-called-processor"),
    ],
)
def test_prefixes(stem: str, component: str, path: str) -> None:
    (entry,) = read({f"{stem}.lora_A.weight": DOWN, f"{stem}.lora_B.weight": UP})
    assert (entry.key, entry.component, entry.path, entry.flat) == (stem, component, path, False)


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param({"unet.r": 2, "unet.lora_alpha": 8}, id="pipeline"),
        pytest.param({"r": 2, "lora_alpha": 8}, id="model"),
        pytest.param({"r": 2, "lora_alpha": 1, "alpha_pattern": {"^unet.a": 8}}, id="whole-path"),
        pytest.param({"unet.r": 2, "unet.lora_alpha": 1, "unet.alpha_pattern": {"^a": 8}}, id="path-in-component"),
    ],
)
def test_metadata(metadata: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = {"unet.a.lora_A.weight": DOWN, "unet.a.lora_B.weight": UP}
    save_file(state, path, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    assert [entry.factor for entry in read(path)] == [4.0]
    save_file({**state, "unet.a.alpha": torch.tensor(6.0)}, path, {"lora_adapter_metadata": json.dumps(metadata)})
    assert [entry.factor for entry in read(path)] == [3.0], "a module's own alpha counts"


def test_metadata_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for metadata, reason in (('{"unet.use_dora": true}', "DoRA"), ("{", "lora_adapter_metadata is not JSON")):
        save_file(PEFT, path, metadata={"lora_adapter_metadata": metadata})
        with pytest.raises(ValueError, match=reason):
            read(path)


# kohya


def test_diffusers_kohya_writer(unet: Any, text_encoder: Any) -> None:
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    models = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder}
    parts = {component: get_peft_model_state_dict(model) for component, model in models.items()}
    state = {f"{component}.{key}": value for component, part in parts.items() for key, value in part.items()}
    entries = read(convert_state_dict_to_kohya(state))
    assert len(entries) == sum(len(layers(model)) for model in models.values())
    for component, model in models.items():
        found = {entry.path: entry for entry in entries if entry.component == component}
        # The writer's alphas are the ranks.
        expected = {name.replace(".", "_"): one for name, one in ones(layers(model)).items()}
        assert set(found) == set(expected)
        for path, (down, up, factor) in expected.items():
            entry = found[path]
            assert torch.equal(entry.down, down) and torch.equal(entry.up, up) and entry.factor == factor and entry.flat


@pytest.mark.parametrize(
    ("alpha", "factor"),
    [
        pytest.param(None, 1.0, id="absent"),
        pytest.param(torch.tensor(0.0), 1.0, id="zero"),
        pytest.param(torch.tensor(3.0), 1.5, id="float"),
        pytest.param(torch.tensor(1), 0.5, id="int"),
        pytest.param(torch.tensor([4.0], dtype=torch.bfloat16), 2.0, id="bfloat16-vector"),
        pytest.param(0.5, 0.25, id="number"),
    ],
)
@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        pytest.param("lora_unet_", "unet", id="unet"),
        pytest.param("lora_te_", "text_encoder", id="te"),
        pytest.param("lora_te1_", "text_encoder", id="te1"),
        pytest.param("lora_te2_", "text_encoder_2", id="te2"),
        pytest.param("lora_te3_", "text_encoder_3", id="te3"),
        pytest.param("lora_transformer_", "transformer", id="transformer"),
    ],
)
def test_kohya_prefixes_and_alphas(prefix: str, component: str, alpha: Any, factor: float) -> None:
    state: dict[str, Any] = {f"{prefix}a_b_0.lora_up.weight": UP, f"{prefix}a_b_0.lora_down.weight": DOWN}
    if alpha is not None:
        state[f"{prefix}a_b_0.alpha"] = alpha
    (entry,) = read(state)
    assert (entry.key, entry.component, entry.path, entry.flat) == (f"{prefix}a_b_0", component, "a_b_0", True)
    assert entry.down is DOWN and entry.up is UP and entry.factor == factor


@pytest.mark.parametrize(
    ("stem", "path", "flat"),
    [
        pytest.param("diffusion_model.a.b", "a.b", False, id="dots"),
        pytest.param("a_b", "a_b", True, id="bare"),
    ],
)
def test_kohya_halves_below_other_names(stem: str, path: str, flat: bool) -> None:
    (entry,) = read({f"{stem}.lora_down.weight": DOWN, f"{stem}.lora_up.weight": UP})
    assert (entry.path, entry.flat, entry.component) == (path, flat, "")
