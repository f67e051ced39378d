"""The original names of Flux and Flux.2, which kohya and ai-toolkit write too, and those of XLabs' processors."""

from fastsample.lora.files.original.family import Family

_IMAGE, _TEXT = (
    "transformer_blocks.{}.attn: to_q to_k to_v",
    "transformer_blocks.{}.attn: add_q_proj add_k_proj add_v_proj",
)

FLUX = Family(
    diffusers="pos_embed time_text_embed x_embedder context_embedder transformer_blocks single_transformer_blocks",
    original="img_in txt_in time_in vector_in double_blocks single_blocks",
    names={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "double_blocks.{}.img_attn.qkv": _IMAGE,
        "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
        "double_blocks.{}.img_mod.lin": "transformer_blocks.{}.norm1.linear",
        "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.net.0.proj",
        "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.net.2",
        "double_blocks.{}.txt_attn.qkv": _TEXT,
        "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
        "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}.norm1_context.linear",
        "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.net.0.proj",
        "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.net.2",
        "single_blocks.{}.linear1": "single_transformer_blocks.{}: attn.to_q attn.to_k attn.to_v proj_mlp",
        "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
        "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
        # XLabs' processors, whose first LoRA is the image's and whose second the text's
        "double_blocks.{}.qkv_lora1": _IMAGE,
        "double_blocks.{}.proj_lora1": "transformer_blocks.{}.attn.to_out.0",
        "double_blocks.{}.qkv_lora2": _TEXT,
        "double_blocks.{}.proj_lora2": "transformer_blocks.{}.attn.to_add_out",
        "single_blocks.{}.qkv": "single_transformer_blocks.{}.attn: to_q to_k to_v",
        "single_blocks.{}.proj": "single_transformer_blocks.{}.proj_out",
    },
    swapped=("final_layer.adaLN_modulation.1",),
)

FLUX2 = Family(
    diffusers="time_guidance_embed x_embedder context_embedder transformer_blocks single_transformer_blocks",
    original="img_in txt_in time_in double_blocks single_blocks single_stream_modulation",
    names={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "double_blocks.{}.img_attn.qkv": _IMAGE,
        "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
        "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.linear_in",
        "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.linear_out",
        "double_blocks.{}.txt_attn.qkv": _TEXT,
        "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
        "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.linear_in",
        "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.linear_out",
        "single_blocks.{}.linear1": "single_transformer_blocks.{}.attn.to_qkv_mlp_proj",
        "single_blocks.{}.linear2": "single_transformer_blocks.{}.attn.to_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    swapped=("final_layer.adaLN_modulation.1",),
    without="rope",
)
