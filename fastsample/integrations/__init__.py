"""fastsample behind the interfaces of other libraries.

acceleration  a whole pipeline of diffusers in one call: its scheduler, projections and LoRAs
diffusers     schedulers of diffusers with a step of one pass
k_diffusion   k-diffusion's sampling functions, which ComfyUI's and A1111's are too
"""
