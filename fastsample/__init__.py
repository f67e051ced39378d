"""fastsample: fast sampling from diffusion models.

>>> import fastsample
>>> images = fastsample.ddim(lambda x, t: 0.1 * x, (16, 3, 32, 32), steps=50, seed=0)
"""

from importlib.metadata import PackageNotFoundError, version

from fastsample import ops, zoo
from fastsample.ops.backend import backends
from fastsample.samplers import DDIM, Sampler, Step, ddim
from fastsample.schedule import Schedule
from fastsample.tables import Table
from fastsample.timesteps import spaced_timesteps

try:
    __version__ = version("fastsample")
except PackageNotFoundError:  # an uninstalled source tree
    __version__ = "0+unknown"

__all__ = ["DDIM", "Sampler", "Schedule", "Step", "Table", "backends", "ddim", "ops", "spaced_timesteps", "zoo"]
