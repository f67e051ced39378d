"""Tiny models of the families whose authors gave their layers other names than diffusers, and a call of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from fastsample.lora.files.aliases import Aliases
from fastsample.lora.files.original import original_names
from fastsample.lora.files.shapes import size_of
from support.lora_modules import small_unet

State = dict[str, Tensor]
_HEADS: dict[str, Any] = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, in_channels=4)


class Tiny(NamedTuple):
    """A model and how it is called."""

    make: Callable[..., nn.Module]
    call: Callable[[nn.Module], Tensor]


def _ones(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).mul(5).sin().reshape(shape)


def _flux(**options: Any) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        num_single_layers=1, joint_attention_dim=12, pooled_projection_dim=6, guidance_embeds=True,
        axes_dims_rope=(2, 2, 4), **{**_HEADS, **options},
    )  # fmt: skip


def _call_flux(model: nn.Module) -> Tensor:
    return model(
        _ones(1, 6, 4), _ones(1, 3, 12), _ones(1, 6), torch.tensor([0.5]), torch.ones(6, 3), torch.zeros(3, 3),
        guidance=torch.tensor([3.5]),
    ).sample  # fmt: skip


def _flux2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        num_single_layers=1, joint_attention_dim=12, timestep_guidance_channels=6, axes_dims_rope=(2, 2, 2, 2), **_HEADS
    )


def _call_flux2(model: nn.Module) -> Tensor:
    given = _ones(1, 6, 4), _ones(1, 3, 12), torch.tensor([0.5]), torch.ones(6, 4), torch.zeros(3, 4)
    return model(*given, guidance=torch.tensor([3.5])).sample


def _sd3(**options: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8, **{**_HEADS, "num_layers": 2, "dual_attention_layers": (0,), **options},
    )  # fmt: skip


def _call_sd3(model: nn.Module) -> Tensor:
    return model(_ones(1, 4, 8, 8), _ones(1, 5, 12), _ones(1, 10), torch.tensor([300])).sample


def _wan(**options: Any) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=6, freq_dim=8, ffn_dim=14,
        num_layers=2, rope_max_seq_len=16, **options,
    )  # fmt: skip


def _wan_i2v() -> nn.Module:
    return _wan(image_dim=10, added_kv_proj_dim=24)


def _call_wan(model: nn.Module) -> Tensor:
    image = {"encoder_hidden_states_image": _ones(1, 257, 10)} if model.config.image_dim else {}
    return model(_ones(1, 4, 1, 4, 4), torch.tensor([300]), _ones(1, 5, 6), **image).sample


def _hunyuan_video(**options: Any) -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        out_channels=4, num_single_layers=1, num_refiner_layers=1, text_embed_dim=10, pooled_projection_dim=6,
        rope_axes_dim=(2, 2, 4), **{**_HEADS, **options},
    )  # fmt: skip


def _call_hunyuan_video(model: nn.Module) -> Tensor:
    given = _ones(1, 4, 1, 4, 4), torch.tensor([300]), _ones(1, 5, 10), torch.ones(1, 5, dtype=torch.int64)
    return model(*given, _ones(1, 6), guidance=torch.tensor([3500.0])).sample


def _hunyuan_video_15() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        out_channels=4, num_refiner_layers=1, text_embed_dim=10, text_embed_2_dim=6, image_embed_dim=6,
        rope_axes_dim=(2, 2, 4), **{**_HEADS, "in_channels": 9},
    )  # fmt: skip


def _hunyuan_image() -> nn.Module:
    return diffusers.HunyuanImageTransformer2DModel(
        out_channels=4, num_single_layers=1, num_refiner_layers=1, text_embed_dim=10, text_embed_2_dim=6,
        guidance_embeds=True, rope_axes_dim=(4, 4), **_HEADS,
    )  # fmt: skip


def _hunyuan_dit() -> nn.Module:
    return diffusers.HunyuanDiT2DModel(
        patch_size=2, sample_size=8, hidden_size=16, cross_attention_dim=6, cross_attention_dim_t5=10,
        pooled_projection_dim=6, text_len=3, text_len_t5=4, **_HEADS,
    )  # fmt: skip


def _z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=10,
        axes_dims=[4, 4, 4], axes_lens=[64, 8, 8],
    )  # fmt: skip


def _call_z_image(model: nn.Module) -> Tensor:
    return model([_ones(4, 1, 4, 4)], torch.tensor([0.5]), [_ones(5, 10)]).sample[0]


def _ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(out_channels=4, cross_attention_dim=16, caption_channels=6, **_HEADS)


def _call_ltx(model: nn.Module) -> Tensor:
    given = _ones(1, 4, 4), _ones(1, 5, 6), torch.tensor([300]), torch.ones(1, 5)
    return model(*given, num_frames=1, height=2, width=2).sample


def _ltx2() -> nn.Module:
    return diffusers.LTX2VideoTransformer3DModel(
        out_channels=4, cross_attention_dim=16, caption_channels=6, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, **_HEADS,
    )  # fmt: skip


def _call_ltx2(model: nn.Module) -> Tensor:
    given = _ones(1, 4, 4), _ones(1, 6, 4), _ones(1, 5, 6), _ones(1, 5, 6), torch.tensor([300])
    return model(*given, num_frames=1, height=2, width=2, audio_num_frames=6).sample


def _qwen_image() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        out_channels=4, joint_attention_dim=12, axes_dims_rope=(2, 2, 4), **_HEADS
    )


def _call_qwen_image(model: nn.Module) -> Tensor:
    given = _ones(1, 4, 4), _ones(1, 5, 12), torch.ones(1, 5, dtype=torch.int64), torch.tensor([0.5])
    return model(*given, img_shapes=[[(1, 2, 2)]]).sample


def _lumina2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, cap_feat_dim=10, axes_dim_rope=(4, 4, 4), axes_lens=(16, 8, 8),
    )  # fmt: skip


def _call_lumina2(model: nn.Module) -> Tensor:
    return model(_ones(1, 4, 8, 8), torch.tensor([0.5]), _ones(1, 5, 10), torch.ones(1, 5, dtype=torch.bool)).sample


# Whose converters are no part of diffusers as it is installed.
OTHERS = {"hunyuan-dit": _hunyuan_dit, "hunyuan-image": _hunyuan_image, "hunyuan-video-1.5": _hunyuan_video_15}
TINY = {
    "flux": Tiny(_flux, _call_flux),
    "flux2": Tiny(_flux2, _call_flux2),
    "hunyuan-video": Tiny(_hunyuan_video, _call_hunyuan_video),
    "ltx": Tiny(_ltx, _call_ltx),
    "ltx2": Tiny(_ltx2, _call_ltx2),
    "lumina2": Tiny(_lumina2, _call_lumina2),
    "qwen-image": Tiny(_qwen_image, _call_qwen_image),
    "sd3": Tiny(_sd3, _call_sd3),
    "sd3-single": Tiny(partial(_sd3, dual_attention_layers=()), _call_sd3),
    "unet": Tiny(small_unet, lambda unet: unet(_ones(1, 4, 8, 8), torch.tensor([300]), _ones(1, 5, 12)).sample),
    "wan": Tiny(_wan, _call_wan),
    "wan-i2v": Tiny(_wan_i2v, _call_wan),
    "z-image": Tiny(_z_image, _call_z_image),
}


def layers_by_authors(
    model: nn.Module, skip: str = r"\bto\.[qkv]$|_lora[12]$|^single_blocks\.\d+\.(qkv|proj)$"
) -> dict[str, tuple[int, ...]]:
    """The layers of a model as its authors name them, with their sizes; those of one name are diffusers' own.

    Args:
        model: of diffusers.
        skip: names that are left out, by default those that a family has for layers with another one.
    """
    aliases = Aliases(model)
    named = dict(original_names(model))
    renamed = {part.module for parts in named.values() for part in parts}
    sizes = {path: size for path, layer in aliases.modules.items() if (size := size_of(layer)) and path not in renamed}
    for name, parts in named.items():
        outputs = {part.module: (size_of(aliases.modules[part.module]) or ())[0] for part in parts}
        sizes[name] = (sum(outputs.values()), *(size_of(aliases.modules[parts[0].module]) or ())[1:])
    return {name: size for name, size in sizes.items() if not re.search(skip, name)}


def dotted(layers: dict[str, tuple[int, ...]], prefix: str = "diffusion_model.", halves: str = "A B") -> State:
    """Random pairs of rank 3 with names as ComfyUI has them."""
    down, up = (f"lora_{half}.weight" for half in halves.split())
    state = {}
    for name, (out, into, *kernel) in layers.items():
        state[f"{prefix}{name}.{down}"] = torch.randn(3, into, *kernel) / 4
        state[f"{prefix}{name}.{up}"] = torch.randn(out, 3, *(1 for _ in kernel)) / 4
    return state


def kohya(layers: dict[str, tuple[int, ...]]) -> State:
    """Random pairs of rank 3 with names as kohya has them, and an alpha of 2 for each."""
    state = dotted({f"lora_unet_{name.replace('.', '_')}": size for name, size in layers.items()}, "", "down up")
    return state | {f"{key.partition('.')[0]}.alpha": torch.tensor(2.0) for key in state}


def products(state: State) -> State:
    """B A by layer of a state dict with PEFT's names."""
    ends = ".lora_A.weight", ".lora_B.weight"
    stems = [key.removesuffix(ends[0]) for key in state if key.endswith(ends[0])]
    return {
        stem: state[stem + ends[1]].flatten(1).double() @ state[stem + ends[0]].flatten(1).double() for stem in stems
    }


def tree_of(layers: dict[str, tuple[int, ...]]) -> nn.Module:
    """Linears and convolutions of these names and sizes."""
    root = nn.Module()
    for name, (out, into, *kernel) in layers.items():
        *parents, last = name.split(".")
        parent = root
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        kinds = {0: nn.Linear, 2: nn.Conv2d, 3: nn.Conv3d}
        parent.add_module(last, kinds[len(kernel)](into, out, *([tuple(kernel)] if kernel else [])))
    return root
