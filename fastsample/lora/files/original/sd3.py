"""The original names of Stable Diffusion 3 and 3.5, which kohya's files are written in."""

from fastsample.lora.files.original.family import Family

SD3 = Family(
    diffusers="pos_embed time_text_embed context_embedder transformer_blocks",
    original="x_embedder t_embedder y_embedder context_embedder joint_blocks final_layer",
    names={
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "joint_blocks.{}.x_block.attn.qkv": "transformer_blocks.{}.attn: to_q to_k to_v",
        "joint_blocks.{}.x_block.attn.proj": "transformer_blocks.{}.attn.to_out.0",
        "joint_blocks.{}.x_block.attn2.qkv": "transformer_blocks.{}.attn2: to_q to_k to_v",
        "joint_blocks.{}.x_block.attn2.proj": "transformer_blocks.{}.attn2.to_out.0",
        "joint_blocks.{}.x_block.adaLN_modulation.1": "transformer_blocks.{}.norm1.linear",
        "joint_blocks.{}.x_block.mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
        "joint_blocks.{}.x_block.mlp.fc2": "transformer_blocks.{}.ff.net.2",
        "joint_blocks.{}.context_block.attn.qkv": "transformer_blocks.{}.attn: add_q_proj add_k_proj add_v_proj",
        "joint_blocks.{}.context_block.attn.proj": "transformer_blocks.{}.attn.to_add_out",
        "joint_blocks.{}.context_block.adaLN_modulation.1": "transformer_blocks.{}.norm1_context.linear",
        "joint_blocks.{}.context_block.mlp.fc1": "transformer_blocks.{}.ff_context.net.0.proj",
        "joint_blocks.{}.context_block.mlp.fc2": "transformer_blocks.{}.ff_context.net.2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    # The last block's context has shift and scale alone.
    swapped=("final_layer.adaLN_modulation.1", "joint_blocks.{}.context_block.adaLN_modulation.1"),
    without="x_embedder",
)
