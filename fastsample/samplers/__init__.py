"""The samplers: each a builder of table rows around the one loop."""

from fastsample.samplers.ddim import DDIM, ddim
from fastsample.samplers.limits import DynamicThreshold
from fastsample.samplers.loop import Sampler
from fastsample.samplers.run import Options, Step

__all__ = ["DDIM", "DynamicThreshold", "Options", "Sampler", "Step", "ddim"]
