"""Latents of a video (B, C, F, H, W) by a flow-matching model: diffusers' WanTransformer3DModel, and its VAE.

For a real model take both from_pretrained; the words are what pipe.encode_prompt returns, and shift is 3 for 480p.
"""

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

import fastsample

# WanTransformer3DModel.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="transformer")
transformer = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=16, num_layers=1
).eval()
# AutoencoderKLWan.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="vae")
vae = AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
words, no_words = torch.randn(1, 12, 8), torch.zeros(1, 12, 8)

mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
video = fastsample.euler(
    transformer,
    (1, 16, 3, 4, 4),  # 9 frames of 32 x 32 pixels
    steps=6,
    prediction="flow",
    shift=3.0,
    seed=0,
    guidance=5.0,
    cond={"encoder_hidden_states": words},
    uncond={"encoder_hidden_states": no_words},
    decode=lambda latents: vae.decode(latents * std + mean),
)
frames = video[0].transpose(0, 1)  # (F, C, H, W)
fastsample.save_grid(frames, "video.png", columns=len(frames))
