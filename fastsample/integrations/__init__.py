"""The samplers behind the interfaces of other libraries.

k_diffusion  k-diffusion's sampling functions, which ComfyUI's and A1111's are too

None of these libraries is imported: who has a model of theirs has them.
"""
