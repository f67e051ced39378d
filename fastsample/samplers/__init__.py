"""The samplers: each a builder of table rows around the one loop."""

from fastsample.loop.cached import cached
from fastsample.loop.guidance import Shared
from fastsample.loop.guidance_methods import Guidance
from fastsample.loop.options import Options, Step, Stop
from fastsample.loop.prepared import Prepared
from fastsample.samplers import catalogue
from fastsample.samplers.batcher import Batcher, Request
from fastsample.samplers.catalogue import *  # noqa: F403 - its own list says which
from fastsample.samplers.guidance_embedding import guidance_scale_embedding
from fastsample.samplers.limits import DynamicThreshold
from fastsample.samplers.optimal_timesteps import optimal_timesteps
from fastsample.samplers.sampler import Sampler
from fastsample.times.solver_timesteps import solver_timesteps

__all__ = [
    "Batcher",
    "DynamicThreshold",
    "Guidance",
    "Options",
    "Prepared",
    "Request",
    "Sampler",
    "Shared",
    "Step",
    "Stop",
    "cached",
    "guidance_scale_embedding",
    "optimal_timesteps",
    "solver_timesteps",
]
__all__ += catalogue.__all__
