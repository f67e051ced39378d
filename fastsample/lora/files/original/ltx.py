"""The original names of LTX-Video and LTX-2, which are diffusers' own but for the embeddings."""

from fastsample.lora.files.original.family import Family

_EMBEDDINGS = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
_LAYERS = ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")

LTX = Family(
    diffusers="proj_in time_embed transformer_blocks proj_out",
    original="patchify_proj adaln_single transformer_blocks proj_out",
    names={
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        **{f"{name}.{layer}": f"{own}.{layer}" for name, own in _EMBEDDINGS.items() for layer in _LAYERS},
    },
)
