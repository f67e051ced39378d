"""The original names of Z-Image and Lumina 2, two models of one design."""

from fastsample.lora.files.original.family import Family

_BLOCKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")

Z_IMAGE = Family(
    diffusers="all_x_embedder all_final_layer noise_refiner context_refiner layers",
    original="x_embedder t_embedder cap_embedder noise_refiner context_refiner layers final_layer",
    names={
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        **{f"{block}.attention.qkv": f"{block}.attention: to_q to_k to_v" for block in _BLOCKS},
        **{f"{block}.attention.out": f"{block}.attention.to_out.0" for block in _BLOCKS},
        **{f"{block}.attention.to.{one}": f"{block}.attention.to_{one}" for block in _BLOCKS for one in "qkv"},
    },
)

LUMINA2 = Family(
    diffusers="time_caption_embed x_embedder noise_refiner context_refiner layers",
    original="x_embedder t_embedder cap_embedder noise_refiner context_refiner layers final_layer",
    names={
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
        **{f"{block}.attention.qkv": f"{block}.attn: to_q to_k to_v" for block in _BLOCKS},
        **{f"{block}.attention.out": f"{block}.attn.to_out.0" for block in _BLOCKS},
        **{f"{block}.feed_forward.w{i}": f"{block}.feed_forward.linear_{i}" for block in _BLOCKS for i in (1, 2, 3)},
        **{f"{block}.adaLN_modulation.1": f"{block}.norm1.linear" for block in _BLOCKS},
    },
)
