"""Wan's original names, with those of its image-to-video, VACE and Animate models."""

from fastsample.lora.files.original.family import Family

_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}

WAN = Family(
    diffusers="condition_embedder patch_embedding blocks",
    original="time_embedding text_embedding time_projection blocks head",
    names={
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        **{f"blocks.{{}}.{name}": f"blocks.{{}}.{own}" for name, own in _BLOCK.items()},
        **{f"vace_blocks.{{}}.{name}": f"vace_blocks.{{}}.{own}" for name, own in _BLOCK.items()},
        "face_adapter.fuser_blocks.{}.linear1_q": "face_adapter.{}.to_q",
        "face_adapter.fuser_blocks.{}.linear1_kv": "face_adapter.{}: to_k to_v",
        "face_adapter.fuser_blocks.{}.linear2": "face_adapter.{}.to_out",
        "head.head": "proj_out",
    },
)
