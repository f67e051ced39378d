"""fastsample: fast sampling from diffusion models.

>>> import fastsample
>>> images = fastsample.ddim(lambda x, t: 0.1 * x, (16, 3, 32, 32), steps=50, seed=0)
"""

from importlib.metadata import PackageNotFoundError, version

from fastsample import lora, ops, samplers, zoo
from fastsample.forward import add_noise, velocity
from fastsample.graph import Graph, graph
from fastsample.images import to_uint8
from fastsample.interpolation import interpolate, slerp
from fastsample.ops.backend import backends
from fastsample.samplers import *  # noqa: F403 - what there is, its own list says
from fastsample.schedule import Schedule
from fastsample.tables import Table
from fastsample.times.continuous import karras_sigmas
from fastsample.times.timesteps import spaced_timesteps

try:
    __version__ = version("fastsample")
except PackageNotFoundError:  # an uninstalled source tree
    __version__ = "0+unknown"

__all__ = [
    "Graph",
    "Schedule",
    "Table",
    "add_noise",
    "backends",
    "graph",
    "interpolate",
    "karras_sigmas",
    "lora",
    "ops",
    "slerp",
    "spaced_timesteps",
    "to_uint8",
    "velocity",
    "zoo",
]
__all__ += samplers.__all__
