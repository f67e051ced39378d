"""k-diffusion's sampling functions: `denoised = model(x, sigma)` through given sigmas, one pass a model call.

    from fastsample.integrations.k_diffusion import sample_euler

    x0 = sample_euler(model, x, sigmas, extra_args={"cond": cond}, callback=print)

The state is x = x0 + sigma z and the model returns x0, as in k-diffusion (Karras et al. 2022) and ComfyUI.

samplers  the functions
tables    each method as a Table: a row of coefficients for each model call
call      what a caller gives, checked
run       the loop: the model, the callback, the row
"""

from fastsample.integrations.k_diffusion.samplers import (
    sample_ddim,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_ipndm,
    sample_lcm,
)

__all__ = [
    "sample_ddim",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_ipndm",
    "sample_lcm",
]
