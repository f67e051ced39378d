"""fastsample: fast sampling from diffusion models.

>>> import fastsample
>>> images = fastsample.ddim(lambda x, t: 0.1 * x, (16, 3, 32, 32), steps=50, seed=0)
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from fastsample import ops, zoo
from fastsample.forward import add_noise, velocity
from fastsample.generation import generate
from fastsample.graph import Graph, graph
from fastsample.images import save_grid, to_uint8
from fastsample.interpolation import interpolate, slerp
from fastsample.likelihood import BitsPerDimension, nll
from fastsample.moved import find_by_earlier_names
from fastsample.ops.available import backends
from fastsample.samplers import (
    DDIM,
    DDPM,
    DEIS,
    IPNDM,
    LCM,
    TCD,
    Batcher,
    Consistency,
    DDIMInverse,
    DPMSolver,
    DynamicThreshold,
    Euler,
    EulerAncestral,
    EulerInverse,
    Guidance,
    Heun,
    Options,
    Prepared,
    Request,
    Sampler,
    Shared,
    Step,
    Stop,
    UniPC,
    cached,
    consistency,
    ddim,
    ddim_invert,
    ddpm,
    deis,
    dpm_solver,
    euler,
    euler_ancestral,
    euler_invert,
    guidance_scale_embedding,
    heun,
    ipndm,
    lcm,
    optimal_timesteps,
    solver_timesteps,
    tcd,
    unipc,
)
from fastsample.samplers.diffusers.door import from_diffusers
from fastsample.schedule import Schedule
from fastsample.tables import Table
from fastsample.times.continuous import karras_sigmas
from fastsample.times.timesteps import spaced_timesteps

if TYPE_CHECKING:
    from fastsample import distill, lora
    from fastsample.integrations.acceleration import accelerate, restore
else:

    def __getattr__(name: str) -> object:
        # These are a third of the package, which those without a need of them need not wait for.
        if name in ("distill", "lora"):
            return importlib.import_module(f"fastsample.{name}")
        if name in ("accelerate", "restore"):
            # Kept, as a submodule is: whoever lists the package's names finds it then.
            found = globals()[name] = getattr(importlib.import_module("fastsample.integrations.acceleration"), name)
            return found
        raise AttributeError(f"module 'fastsample' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


find_by_earlier_names()

try:
    __version__ = version("fastsample")
except PackageNotFoundError:  # an uninstalled source tree
    __version__ = "0+unknown"

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "IPNDM",
    "LCM",
    "TCD",
    "Batcher",
    "BitsPerDimension",
    "Consistency",
    "DDIMInverse",
    "DPMSolver",
    "DynamicThreshold",
    "Euler",
    "EulerAncestral",
    "EulerInverse",
    "Graph",
    "Guidance",
    "Heun",
    "Options",
    "Prepared",
    "Request",
    "Sampler",
    "Schedule",
    "Shared",
    "Step",
    "Stop",
    "Table",
    "UniPC",
    "accelerate",
    "add_noise",
    "backends",
    "cached",
    "consistency",
    "ddim",
    "ddim_invert",
    "ddpm",
    "deis",
    "distill",
    "dpm_solver",
    "euler",
    "euler_ancestral",
    "euler_invert",
    "from_diffusers",
    "generate",
    "graph",
    "guidance_scale_embedding",
    "heun",
    "interpolate",
    "ipndm",
    "karras_sigmas",
    "lcm",
    "lora",
    "nll",
    "ops",
    "optimal_timesteps",
    "restore",
    "save_grid",
    "slerp",
    "solver_timesteps",
    "spaced_timesteps",
    "tcd",
    "to_uint8",
    "unipc",
    "velocity",
    "zoo",
]
