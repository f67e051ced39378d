"""The samplers: each a builder of table rows around the one loop."""

from fastsample.loop.guidance import Shared
from fastsample.loop.options import Options, Step
from fastsample.loop.prepared import Prepared
from fastsample.samplers.batcher import Batcher, Request
from fastsample.samplers.consistency import Consistency, consistency
from fastsample.samplers.ddim import DDIM, ddim
from fastsample.samplers.ddpm import DDPM, ddpm
from fastsample.samplers.dpm_solver import DPMSolver, dpm_solver
from fastsample.samplers.euler import Euler, EulerAncestral, euler, euler_ancestral
from fastsample.samplers.guidance_embedding import guidance_scale_embedding
from fastsample.samplers.heun import Heun, heun
from fastsample.samplers.inversion import DDIMInverse, EulerInverse, ddim_invert, euler_invert
from fastsample.samplers.lcm import LCM, lcm
from fastsample.samplers.limits import DynamicThreshold
from fastsample.samplers.sampler import Sampler
from fastsample.samplers.tcd import TCD, tcd
from fastsample.times.solver_timesteps import solver_timesteps

__all__ = [
    "DDIM",
    "DDPM",
    "LCM",
    "TCD",
    "Batcher",
    "Consistency",
    "DDIMInverse",
    "DPMSolver",
    "DynamicThreshold",
    "Euler",
    "EulerAncestral",
    "EulerInverse",
    "Heun",
    "Options",
    "Prepared",
    "Request",
    "Sampler",
    "Shared",
    "Step",
    "consistency",
    "ddim",
    "ddim_invert",
    "ddpm",
    "dpm_solver",
    "euler",
    "euler_ancestral",
    "euler_invert",
    "guidance_scale_embedding",
    "heun",
    "lcm",
    "solver_timesteps",
    "tcd",
]
