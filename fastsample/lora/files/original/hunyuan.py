"""The original names of the Hunyuan models: HunyuanVideo and its 1.5, HunyuanImage, HunyuanDiT."""

from fastsample.lora.files.original.family import Family

_REFINER, _REFINED = "txt_in.individual_token_refiner.blocks.{}", "context_embedder.token_refiner.refiner_blocks.{}"
_STREAMS = {
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    f"{_REFINER}.self_attn_qkv": f"{_REFINED}.attn: to_q to_k to_v",
    f"{_REFINER}.self_attn_proj": f"{_REFINED}.attn.to_out.0",
    f"{_REFINER}.mlp.fc1": f"{_REFINED}.ff.net.0.proj",
    f"{_REFINER}.mlp.fc2": f"{_REFINED}.ff.net.2",
    f"{_REFINER}.adaLN_modulation.1": f"{_REFINED}.norm_out.linear",
    "double_blocks.{}.img_attn_qkv": "transformer_blocks.{}.attn: to_q to_k to_v",
    "double_blocks.{}.img_attn_proj": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.img_mod.linear": "transformer_blocks.{}.norm1.linear",
    "double_blocks.{}.img_mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "double_blocks.{}.txt_attn_qkv": "transformer_blocks.{}.attn: add_q_proj add_k_proj add_v_proj",
    "double_blocks.{}.txt_attn_proj": "transformer_blocks.{}.attn.to_add_out",
    "double_blocks.{}.txt_mod.linear": "transformer_blocks.{}.norm1_context.linear",
    "double_blocks.{}.txt_mlp.fc1": "transformer_blocks.{}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.fc2": "transformer_blocks.{}.ff_context.net.2",
    "single_blocks.{}.linear1": "single_transformer_blocks.{}: attn.to_q attn.to_k attn.to_v proj_mlp",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
    "single_blocks.{}.modulation.linear": "single_transformer_blocks.{}.norm.linear",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
# The later models have single projections, where their files may have the fused ones of the first.
_SINGLE = {
    "double_blocks.{}.img_attn_q": "transformer_blocks.{}.attn.to_q",
    "double_blocks.{}.img_attn_k": "transformer_blocks.{}.attn.to_k",
    "double_blocks.{}.img_attn_v": "transformer_blocks.{}.attn.to_v",
    "double_blocks.{}.txt_attn_q": "transformer_blocks.{}.attn.add_q_proj",
    "double_blocks.{}.txt_attn_k": "transformer_blocks.{}.attn.add_k_proj",
    "double_blocks.{}.txt_attn_v": "transformer_blocks.{}.attn.add_v_proj",
    "single_blocks.{}.linear1_q": "single_transformer_blocks.{}.attn.to_q",
    "single_blocks.{}.linear1_k": "single_transformer_blocks.{}.attn.to_k",
    "single_blocks.{}.linear1_v": "single_transformer_blocks.{}.attn.to_v",
    "single_blocks.{}.linear1_mlp": "single_transformer_blocks.{}.proj_mlp",
    "single_blocks.{}.linear2.fc": "single_transformer_blocks.{}.proj_out",
}
_GLYPHS = {f"byt5_in.fc{i}": f"context_embedder_2.linear_{i}" for i in (1, 2, 3)}
_SWAPPED = ("final_layer.adaLN_modulation.1",)

HUNYUAN_VIDEO = Family(
    diffusers="rope time_text_embed x_embedder context_embedder transformer_blocks single_transformer_blocks",
    original="txt_in time_in vector_in double_blocks single_blocks",
    names={
        **_STREAMS,
        "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    },
    swapped=_SWAPPED,
)

HUNYUAN_VIDEO_15 = Family(
    diffusers="rope time_embed cond_type_embed image_embedder context_embedder transformer_blocks",
    original="txt_in time_in byt5_in vision_in double_blocks final_layer",
    names={
        **_STREAMS,
        **_SINGLE,
        **_GLYPHS,
        "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
        "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
        "vision_in.proj.1": "image_embedder.linear_1",
        "vision_in.proj.3": "image_embedder.linear_2",
    },
    swapped=_SWAPPED,
)

HUNYUAN_IMAGE = Family(
    diffusers="rope time_guidance_embed x_embedder context_embedder transformer_blocks single_transformer_blocks",
    original="img_in txt_in time_in byt5_in double_blocks single_blocks",
    names={
        **_STREAMS,
        **_SINGLE,
        **_GLYPHS,
        "img_in.proj": "x_embedder.proj",
        "time_in.mlp.0": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.mlp.2": "time_guidance_embed.timestep_embedder.linear_2",
        "time_r_in.mlp.0": "time_guidance_embed.timestep_embedder_r.linear_1",
        "time_r_in.mlp.2": "time_guidance_embed.timestep_embedder_r.linear_2",
        "guidance_in.mlp.0": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.mlp.2": "time_guidance_embed.guidance_embedder.linear_2",
    },
    swapped=_SWAPPED,
)

HUNYUAN_DIT = Family(
    diffusers="time_extra_emb text_embedder pos_embed blocks",
    original="x_embedder t_embedder pooler mlp_t5 blocks final_layer",
    names={
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
        "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
        "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
        "mlp_t5.0": "text_embedder.linear_1",
        "mlp_t5.2": "text_embedder.linear_2",
        **{f"pooler.{one}_proj": f"time_extra_emb.pooler.{one}_proj" for one in "qkvc"},
        "blocks.{}.attn1.Wqkv": "blocks.{}.attn1: to_q to_k to_v",
        "blocks.{}.attn1.out_proj": "blocks.{}.attn1.to_out.0",
        "blocks.{}.attn2.q_proj": "blocks.{}.attn2.to_q",
        "blocks.{}.attn2.kv_proj": "blocks.{}.attn2: to_k to_v",
        "blocks.{}.attn2.out_proj": "blocks.{}.attn2.to_out.0",
        "blocks.{}.default_modulation.1": "blocks.{}.norm1.linear",
        "blocks.{}.mlp.fc1": "blocks.{}.ff.net.0.proj",
        "blocks.{}.mlp.fc2": "blocks.{}.ff.net.2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    swapped=_SWAPPED,
)
