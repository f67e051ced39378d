"""Random weights in the place of Stable Diffusion's, so that these examples need no download. You do not need it."""

import json
import string
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LETTERS = string.ascii_lowercase
TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def stable_diffusion() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(TOKENS)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=32)
    sizes = {"vocab_size": len(TOKENS), "hidden_size": 8, "intermediate_size": 16, "max_position_embeddings": 32}
    numbers = {"num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 52, "eos_token_id": 53}
    text_encoder = CLIPTextModel(CLIPTextConfig(**sizes, **numbers))
    small = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = UNet2DConditionModel(cross_attention_dim=8, attention_head_dim=4, **small, **blocks)
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, steps_offset=1)
    parts = {"vae": AutoencoderKL(**small), "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
    parts |= {"scheduler": scheduler, "safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def save_lora(unet: UNet2DConditionModel, path: str) -> None:
    """Writes a LoRA file of rank 2 on the queries, keys and values."""
    layers = {name: layer for name, layer in unet.named_modules() if name.endswith(("to_q", "to_k", "to_v"))}
    down = {f"unet.{name}.lora_A.weight": torch.randn(2, layer.in_features) for name, layer in layers.items()}
    up = {f"unet.{name}.lora_B.weight": torch.randn(layer.out_features, 2) for name, layer in layers.items()}
    save_file(down | up, path)
