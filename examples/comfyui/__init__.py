"""fastsample's samplers as a node of ComfyUI: copy this folder into custom_nodes/."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import comfy.samplers
from torch import Tensor

from fastsample.integrations import k_diffusion

# Which options of the node each sampler takes.
SAMPLERS: dict[str, tuple[str, ...]] = {
    "euler": (),
    "euler_ancestral": ("eta", "s_noise"),
    "heun": (),
    "dpmpp_2m": (),
    "dpmpp_2m_sde": ("eta", "s_noise", "solver_type"),
    "lcm": (),
    "ddim": ("eta", "s_noise"),
    "ipndm": (),
}
DRAWING = ("euler_ancestral", "dpmpp_2m_sde", "lcm", "ddim")


class FastsampleSampler:
    """Gives a SAMPLER for SamplerCustom and SamplerCustomAdvanced."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01, "round": False}
        of_eta = "how much noise is new, in euler_ancestral, dpmpp_2m_sde and ddim; 0 is none"
        return {
            "required": {
                "sampler": (list(SAMPLERS),),
                "eta": ("FLOAT", {**share, "tooltip": of_eta}),
                "s_noise": ("FLOAT", {**share, "tooltip": "what that noise is multiplied by"}),
                "solver_type": (["midpoint", "heun"], {"tooltip": "of dpmpp_2m_sde"}),
            }
        }

    def get_sampler(self, sampler: str, eta: float, s_noise: float, solver_type: str) -> tuple[Any]:
        given = {"eta": eta, "s_noise": s_noise, "solver_type": solver_type}
        options = {name: given[name] for name in SAMPLERS[sampler]}
        function = getattr(k_diffusion, f"sample_{sampler}")
        if sampler in DRAWING:
            function = functools.partial(sample_with_seed, function)
        return (comfy.samplers.KSAMPLER(function, extra_options=options),)


def sample_with_seed(
    function: Callable[..., Tensor],
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    **options: Any,
) -> Tensor:
    """function's sample, with its noise drawn from the seed of the workflow: the same on every device."""
    if is_flow(model) and options.get("eta", 1.0) > 0:
        raise ValueError(
            "this sampler adds the noise of diffusion models, and the model is a flow: take euler, or eta 0"
        )
    seed = (extra_args or {}).get("seed")
    return function(model, x, sigmas, extra_args, callback, disable, seed=seed, **options)


def is_flow(model: Any) -> bool:
    """Whether ComfyUI's model has states (1 - sigma) x0 + sigma z."""
    for name in ("inner_model", "inner_model", "model_sampling"):
        model = getattr(model, name, None)
    return any(kind.__name__ == "CONST" for kind in type(model).__mro__)


NODE_CLASS_MAPPINGS = {"FastsampleSampler": FastsampleSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"FastsampleSampler": "fastsample sampler"}
