"""The list of all samplers: of each its class and its function. catalogue.pyi says the same to type checkers."""

from fastsample.samplers.consistency import Consistency, consistency
from fastsample.samplers.ddim import DDIM, ddim
from fastsample.samplers.ddpm import DDPM, ddpm
from fastsample.samplers.deis import DEIS, deis
from fastsample.samplers.dpm_solver import DPMSolver, dpm_solver
from fastsample.samplers.euler import Euler, EulerAncestral, euler, euler_ancestral
from fastsample.samplers.heun import Heun, heun
from fastsample.samplers.inversion import DDIMInverse, EulerInverse, ddim_invert, euler_invert
from fastsample.samplers.ipndm import IPNDM, ipndm
from fastsample.samplers.lcm import LCM, lcm
from fastsample.samplers.tcd import TCD, tcd
from fastsample.samplers.unipc import UniPC, unipc

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "IPNDM",
    "LCM",
    "TCD",
    "Consistency",
    "DDIMInverse",
    "DPMSolver",
    "Euler",
    "EulerAncestral",
    "EulerInverse",
    "Heun",
    "UniPC",
    "consistency",
    "ddim",
    "ddim_invert",
    "ddpm",
    "deis",
    "dpm_solver",
    "euler",
    "euler_ancestral",
    "euler_invert",
    "heun",
    "ipndm",
    "lcm",
    "tcd",
    "unipc",
]
