"""fastsample behind the interfaces of other libraries.

diffusers    schedulers of diffusers with a step of one pass
k_diffusion  k-diffusion's sampling functions, which ComfyUI's and A1111's are too
"""
