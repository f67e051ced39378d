"""Files in the names of the models' authors have the effect that diffusers' own converters give them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_utils
from torch import nn

from fastsample import lora
from fastsample.lora.files.formats import read
from fastsample.lora.files.names import resolve
from support.lora_families import OTHERS, TINY, State, dotted, kohya, layers_by_authors, products, tree_of

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

# A pair of the largest value 1 is held to as much of it.
TOLERANCE = 1e-5


def flat(layers: dict[str, tuple[int, ...]]) -> State:
    return kohya(layers)


def underscored(layers: dict[str, tuple[int, ...]]) -> State:
    return dotted(layers, halves="down up") | {f"diffusion_model.{name}.alpha": torch.tensor(2.0) for name in layers}


def xlabs(_: dict[str, tuple[int, ...]]) -> State:
    names = {
        **{f"double_blocks.0.processor.qkv_lora{i}": (48, 16) for i in (1, 2)},
        **{f"double_blocks.0.processor.proj_lora{i}": (16, 16) for i in (1, 2)},
        "single_blocks.0.processor.qkv_lora": (48, 16),
    }
    state = dotted(names, "", "A B")
    return {key.replace("lora_A", "down").replace("lora_B", "up"): value for key, value in state.items()}


# What diffusers cannot convert at this size, whose widths it has as constants, or leaves out.
LINEAR1 = r"\.linear1$"
FLUX_LEFT = rf"{LINEAR1}|\bto\.[qkv]$|_lora[12]$|^single_blocks\.\d+\.(qkv|proj)$"
CASES = [
    ("flux", flat, "_convert_kohya_flux_lora_to_diffusers", rf"{FLUX_LEFT}|final_layer"),
    ("flux", underscored, "_convert_kohya_flux_lora_to_diffusers", rf"{FLUX_LEFT}|final_layer"),
    ("flux", xlabs, "_convert_xlabs_flux_lora_to_diffusers", ""),
    ("flux2", flat, "_convert_kohya_flux2_lora_to_diffusers", "guidance_in|modulation|adaLN"),
    ("flux2", dotted, "_convert_non_diffusers_flux2_lora_to_diffusers", "adaLN"),
    (
        "hunyuan-video",
        dotted,
        "_convert_hunyuan_video_lora_to_diffusers",
        rf"{LINEAR1}|self_attn_qkv|img_in|^final_layer.ada",
    ),
    ("ltx", dotted, "_convert_non_diffusers_ltxv_lora_to_diffusers", "patchify_proj|adaln_single"),
    ("ltx2", dotted, "_convert_non_diffusers_ltx2_lora_to_diffusers", "$^"),
    ("qwen-image", dotted, "_convert_non_diffusers_qwen_lora_to_diffusers", "$^"),
    ("qwen-image", flat, "_convert_non_diffusers_qwen_lora_to_diffusers", "_mlp|_mod"),
    ("wan", dotted, "_convert_non_diffusers_wan_lora_to_diffusers", "patch_embedding"),
    ("wan", underscored, "_convert_non_diffusers_wan_lora_to_diffusers", "^(?!blocks)"),
    ("wan-i2v", dotted, "_convert_non_diffusers_wan_lora_to_diffusers", "patch_embedding"),
    ("wan-i2v", flat, "_convert_musubi_wan_lora_to_diffusers", "^(?!blocks)"),
    ("z-image", flat, "_convert_non_diffusers_z_image_lora_to_diffusers", r"\bto\.[qkv]$|final|x_embedder|refiner"),
    ("z-image", underscored, "_convert_non_diffusers_z_image_lora_to_diffusers", r"\bto\.[qkv]$|final|x_embedder|qkv"),
]


@pytest.mark.parametrize(
    ("family", "style", "converter", "skip"),
    [pytest.param(*case, id=f"{case[0]}-{case[1].__name__}") for case in CASES],
)
def test_as_diffusers_converts_them(family: str, style: Callable[[Any], State], converter: str, skip: str) -> None:
    ours = TINY[family].make().eval().requires_grad_(False)
    theirs, plain = copy.deepcopy(ours), copy.deepcopy(ours)
    state = style(layers_by_authors(ours, skip))
    converted = getattr(lora_conversion_utils, converter)({key: value.clone() for key, value in state.items()})
    theirs.load_lora_adapter({key.removeprefix("transformer."): value for key, value in converted.items()}, prefix=None)
    report = lora.attach(ours, state)
    assert_same_products(lora.state_dict(ours), theirs)
    assert report.unmatched == report.elsewhere == ()
    with torch.no_grad():
        got, want, without = (TINY[family].call(model) for model in (ours, theirs, plain))
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()
    lora.swap(ours, state)
    assert_same_products(lora.state_dict(ours), theirs)
    assert (without - want).abs().max() > 100 * TOLERANCE * want.abs().max(), "the LoRA must matter"


def assert_same_products(state: State, theirs: Any) -> None:
    got = products(state)
    want = {
        name: layer.get_delta_weight(layer.active_adapters[0]).flatten(1)
        for name, layer in theirs.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert set(got) == set(want) and got
    for name, product in want.items():
        assert (got[name] - product).abs().max() <= TOLERANCE * product.abs().max(), name


# What turns whole models of the authors into diffusers' says of each layer which outputs are where.
CHECKPOINTS = {
    "flux2": ("convert_flux2_transformer_checkpoint_to_diffusers", ""),
    "hunyuan-video": ("convert_hunyuan_video_transformer_to_diffusers", LINEAR1),
    "ltx": ("convert_ltx_transformer_checkpoint_to_diffusers", ""),
    "ltx2": ("convert_ltx2_transformer_to_diffusers", ""),
    "lumina2": ("convert_lumina2_to_diffusers", "qkv"),
    "sd3": ("convert_sd3_transformer_checkpoint_to_diffusers", ""),
    "wan": ("convert_wan_transformer_to_diffusers", ""),
    "wan-i2v": ("convert_wan_transformer_to_diffusers", ""),
    "z-image": ("convert_z_image_transformer_checkpoint_to_diffusers", r"\bto\.[qkv]$"),
}


def converted(family: str, state: State) -> State:
    """The products of a LoRA in the authors' names, by diffusers' names of the layers."""
    checkpoint = {f"{name}.weight": product for name, product in products(state).items()}
    if family == "sd3":  # whose converter takes whole models alone
        checkpoint |= {f"{name[:-7]}.bias": torch.zeros(len(product)) for name, product in checkpoint.items()}
        checkpoint["pos_embed"] = torch.zeros(1)
    of_diffusers = getattr(single_file_utils, CHECKPOINTS[family][0])(checkpoint)
    return {key[:-7]: value for key, value in of_diffusers.items() if key.endswith(".weight")}


def assert_close(got: State, want: State) -> None:
    assert set(got) == set(want) and got
    for name, product in want.items():
        assert (got[name] - product).abs().max() <= TOLERANCE * product.abs().max(), name


@pytest.mark.parametrize("style", ["kohya", "dots"])
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_as_diffusers_converts_whole_models(family: str, style: str) -> None:
    model = TINY[family].make().eval().requires_grad_(False)
    layers = layers_by_authors(model, CHECKPOINTS[family][1] or "$^")
    state = dotted(layers, prefix="")
    file = {f"diffusion_model.{key}": value for key, value in state.items()}
    if style == "kohya":
        file = {f"lora_unet_{flattened(key)}": value for key, value in state.items()}
    report = lora.attach(model, file)
    assert report.unmatched == report.elsewhere == ()
    assert_close(products(lora.state_dict(model)), converted(family, state))


def flattened(key: str) -> str:
    stem, half = key.split(".lora_")
    return f"{stem.replace('.', '_')}.lora_{'down' if half.startswith('A') else 'up'}.weight"


@pytest.mark.parametrize("family", [name for name in CHECKPOINTS if name != "lumina2"])
def test_diffusers_names_on_the_authors_model(family: str) -> None:
    """The tables are read in both directions."""
    skip = CHECKPOINTS[family][1]
    layers = layers_by_authors(TINY[family].make(), skip or "$^")
    theirs = tree_of(layers).requires_grad_(False)
    own = {
        name: tuple(layer.weight.shape)
        for name, layer in TINY[family].make().named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d) and not (skip == LINEAR1 and SINGLE.search(name))
    }
    state = dotted(own, prefix="transformer.")
    report = lora.attach(theirs, state)
    assert report.unmatched == report.elsewhere == () and set(report.matched) == set(layers)
    want = {name.removeprefix("transformer."): product for name, product in products(state).items()}
    assert_close(converted(family, lora.state_dict(theirs)), want)


SINGLE = re.compile(r"^single_.*(to_[qkv]|proj_mlp)$")


@pytest.mark.parametrize(
    ("family", "converter", "style"),
    [
        pytest.param("flux", "_convert_kohya_flux_lora_to_diffusers", kohya, id="flux"),
        pytest.param("hunyuan-video", "_convert_hunyuan_video_lora_to_diffusers", dotted, id="hunyuan-video"),
    ],
)
def test_the_first_linear_of_single_blocks(family: str, converter: str, style: Callable[[Any], State]) -> None:
    """It is q, k, v and the half of an MLP; diffusers splits it at the width of the large model alone."""
    with torch.device("meta"):
        model = TINY[family].make(num_attention_heads=24, attention_head_dim=128, num_layers=1)
    state = style({"single_blocks.0.linear1": (7 * 3072, 3072)})
    split = getattr(lora_conversion_utils, converter)(dict(state))
    file = read(state)
    found = resolve(model, file.entries, file.left)
    assert not found.unmatched and len(found.entries) == 4
    x = torch.randn(3072)
    for name, entry in found.entries.items():
        down, up = (split[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
        want = up @ (down @ x)
        got = entry.factor * entry.up @ (entry.down @ x)
        assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


def whole(model: nn.Module) -> State:
    return dotted(
        {name: tuple(layer.weight.shape) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}, ""
    )


@pytest.mark.parametrize("family", ["flux", "sd3-single", "unet", "wan", "wan-i2v"])
def test_projections_that_diffusers_fused_before(family: str) -> None:
    """Of a fused block the single projections are there, and not run."""
    plain = TINY[family].make().eval().requires_grad_(False)
    state, fused = whole(plain), copy.deepcopy(plain)
    fused.fuse_qkv_projections()
    lora.attach(plain, state)
    report = lora.attach(fused, state)
    assert any(name.endswith((".to_qkv", ".to_kv")) for name in report.matched) and not report.unmatched
    with torch.no_grad():
        got, want = (TINY[family].call(model) for model in (fused, plain))
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


@pytest.mark.parametrize("alphas", [pytest.param((4.0, 4.0), id="alike"), pytest.param((4.0, 9.0), id="unlike")])
def test_some_of_the_projections_of_a_fused_block(alphas: tuple[float, float]) -> None:
    fused = TINY["sd3"].make().eval().requires_grad_(False)
    fused.fuse_qkv_projections()
    block = "transformer_blocks.0.attn"
    state = dotted({f"{block}.to_q": (16, 16), f"{block}.to_v": (16, 16)}, "")
    alpha = {f"{block}.to_{one}.alpha": torch.tensor(value) for one, value in zip("qv", alphas, strict=True)}
    lora.attach(fused, {**state, **alpha})
    [(name, got)] = products(lora.state_dict(fused)).items()
    q, v = (value * factor / 3 for value, factor in zip(products(state).values(), alphas, strict=True))
    want = torch.cat([q, torch.zeros(16, 16), v])
    assert name == f"{block}.to_qkv" and (got - want).abs().max() <= TOLERANCE * want.abs().max()


def test_fused_keys_on_single_projections() -> None:
    model = TINY["sd3"].make().eval().requires_grad_(False)
    state = dotted(
        {"transformer_blocks.0.attn.to_qkv": (48, 16), "transformer_blocks.0.attn.to_added_qkv": (48, 16)}, ""
    )
    lora.attach(model, state)
    got = products(lora.state_dict(model))
    for fused, singles in {"to_qkv": "to_q to_k to_v", "to_added_qkv": "add_q_proj add_k_proj add_v_proj"}.items():
        want = products(state)[f"transformer_blocks.0.attn.{fused}"]
        joined = torch.cat([got[f"transformer_blocks.0.attn.{single}"] for single in singles.split()])
        assert (joined - want).abs().max() <= TOLERANCE * want.abs().max()


def test_a_fused_key_beside_a_single_one_of_the_same_block() -> None:
    """Which of them counts is not said: neither is attached, to no layer."""
    model = TINY["z-image"].make().eval().requires_grad_(False)
    block = "layers.0.attention"
    state = dotted({f"{block}.qkv": (72, 24), f"{block}.to_q": (24, 24), f"{block}.out": (24, 24)}, "")
    with pytest.raises(ValueError, match=rf"{block}\.qkv, {block}\.to_q all name {block}\.to_q"):
        lora.attach(model, state)
    report = lora.attach(model, state, strict=False)
    assert report.matched == (f"{block}.to_out.0",) and set(report.unmatched) == {f"{block}.qkv", f"{block}.to_q"}


@pytest.mark.parametrize("same", [True, False])
def test_fused_keys_beside_single_ones(same: bool) -> None:
    """Some trainers of Z-Image write both; the single ones count, and the fused one must say the same."""
    model = TINY["z-image"].make().eval().requires_grad_(False)
    block = "layers.0.attention"
    fused = dotted({f"{block}.qkv": (72, 24)}, "")
    down, up = fused.values()
    state = {}
    for one, rows in zip("qkv", up.chunk(3), strict=True):
        state |= {f"{block}.to.{one}.lora.down.weight": down, f"{block}.to.{one}.lora.up.weight": rows.clone()}
    if not same:
        state[f"{block}.to.k.lora.up.weight"] *= 1.1
    report = lora.attach(model, {**state, **fused}, strict=same)
    assert set(report.matched) == {f"{block}.to_{one}" for one in "qkv"}
    assert (report.elsewhere, report.unmatched) == ((f"{block}.qkv",), ())[:: 1 if same else -1]
    assert ("repeats" if same else "another thing") in report.reasons[f"{block}.qkv"]


# By diffusers' scripts that convert the whole models.
HUNYUAN = {
    "hunyuan-dit": {
        "blocks.0.attn1.Wqkv": "blocks.0.attn1.to_q blocks.0.attn1.to_k blocks.0.attn1.to_v",
        "blocks.0.attn2.kv_proj": "blocks.0.attn2.to_k blocks.0.attn2.to_v",
        "blocks.0.default_modulation.1": "blocks.0.norm1.linear",
        "mlp_t5.2": "text_embedder.linear_2",
        "pooler.c_proj": "time_extra_emb.pooler.c_proj",
    },
    "hunyuan-image": {
        "double_blocks.0.img_attn_k": "transformer_blocks.0.attn.to_k",
        "single_blocks.0.linear1_mlp": "single_transformer_blocks.0.proj_mlp",
        "single_blocks.0.linear2.fc": "single_transformer_blocks.0.proj_out",
        "byt5_in.fc3": "context_embedder_2.linear_3",
        "guidance_in.mlp.2": "time_guidance_embed.guidance_embedder.linear_2",
        "img_in.proj": "x_embedder.proj",
    },
    "hunyuan-video-1.5": {
        "double_blocks.0.txt_attn_q": "transformer_blocks.0.attn.add_q_proj",
        "double_blocks.0.img_mlp.fc1": "transformer_blocks.0.ff.net.0.proj",
        "vision_in.proj.3": "image_embedder.linear_2",
        "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    },
}


@pytest.mark.parametrize("family", HUNYUAN)
def test_other_models_of_hunyuan(family: str) -> None:
    model = OTHERS[family]().requires_grad_(False)
    every = layers_by_authors(model, "$^")
    own = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    assert not own & set(every), "each layer has an original name"
    names = [*HUNYUAN[family], "final_layer.adaLN_modulation.1"]
    state = dotted({name: every[name] for name in names}, "")
    lora.attach(model, {f"diffusion_model.{key}": value for key, value in state.items()})
    got, want = products(lora.state_dict(model)), products(state)
    shift, scale = want.pop("final_layer.adaLN_modulation.1").chunk(2)
    want["norm_out.linear"] = torch.cat([scale, shift])
    for original, targets in HUNYUAN[family].items():
        parts = want.pop(original).chunk(len(targets.split()))
        want |= dict(zip(targets.split(), parts, strict=True))
    assert_close(got, want)
