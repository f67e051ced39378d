"""Small pipelines of diffusers with random weights, made of configurations alone, and PEFT's LoRAs for them."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray

Image = NDArray[np.float32]
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
WIDTH = 12  # of the tokens
# How far apart two images may be that compute the same in another order: 2 of 255.
NEAR = 2 / 255


def tokenizer(folder: Path) -> Any:
    """One that knows letters."""
    tokens = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=9)


def text_encoder() -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
        bos_token_id=52,
        eos_token_id=53,
    )
    return transformers.CLIPTextModel(config).eval()


def vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8, shift_factor=0.0
    ).eval()


def unet(**options: Any) -> Any:
    """Two transformers, one before the middle and one in it."""
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    ).eval()


def ddim() -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def stable_diffusion(folder: Path | None = None) -> Any:
    """Of the shape of Stable Diffusion 1.5. Without a folder, which a tokenizer needs, it takes embeddings alone."""
    return quiet(
        diffusers.StableDiffusionPipeline(
            vae=vae(),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(folder) if folder else None,
            unet=unet(),
            scheduler=ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def stable_diffusion_xl() -> Any:
    network = unet(
        transformer_layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=6 * 2 + WIDTH,
    )
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    none = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    return quiet(diffusers.StableDiffusionXLPipeline(vae=vae(), unet=network, scheduler=scheduler, **none))


def stable_diffusion_3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        in_channels=4,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )
    none = dict.fromkeys([f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(
        diffusers.StableDiffusion3Pipeline(vae=vae(), transformer=transformer.eval(), scheduler=scheduler, **none)
    )


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    none = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(diffusers.FluxPipeline(vae=vae(), transformer=transformer.eval(), scheduler=scheduler, **none))


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd15": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
}


def network_of(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


def image(pipeline: Any, **options: Any) -> Image:
    """Of two steps from the same seed, values in 0..1."""
    draws = torch.Generator().manual_seed(1)
    given: dict[str, Any] = {"prompt_embeds": torch.randn(1, 7, WIDTH, generator=draws)}
    pooled = torch.randn(1, WIDTH, generator=draws)
    if not isinstance(pipeline, diffusers.StableDiffusionPipeline):
        given["pooled_prompt_embeds"] = pooled
    if not isinstance(pipeline, diffusers.FluxPipeline):
        given |= {f"negative_{name}": -value for name, value in given.items()}
    given |= {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "np"}
    made: Image = pipeline(**given, generator=torch.Generator().manual_seed(0), **options).images
    return made


def add_lora(network: Any, name: str = "style", targets: Any = TARGETS, rank: int = 4, **options: Any) -> None:
    """A LoRA of PEFT's layers that is easily seen."""
    config = peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, init_lora_weights=False, **options)
    network.add_adapter(config, name)
    network.requires_grad_(False)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Before:
    """A pipeline's modules, PEFT's state, its scheduler and image, which have to be the same again."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.image, self.state = image(pipeline), self._state()

    def _state(self) -> Any:
        network = network_of(self.pipeline)
        scheduler = self.pipeline.scheduler
        return {
            "modules": [(name, id(module), sorted(vars(module))) for name, module in network.named_modules()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()],
            "processors": [id(getattr(module, "processor", None)) for module in network.modules()],
            "parameters": [(name, id(p), p.data_ptr()) for name, p in network.named_parameters()],
            "lora": [_lora_state(module) for module in network.modules() if hasattr(module, "lora_A")],
            "scheduler": (id(scheduler), sorted(vars(scheduler))),
            "config": dict(self.pipeline.config),
        }

    def check(self) -> None:
        state = self._state()
        assert {name: value for name, value in state.items() if value != self.state[name]} == {}
        assert np.array_equal(image(self.pipeline), self.image)


def _lora_state(layer: Any) -> tuple[Any, ...]:
    return layer.active_adapters, dict(layer.scaling), layer.disable_adapters, list(layer.merged_adapters)
