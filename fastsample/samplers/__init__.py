"""The samplers: each a builder of table rows around the one loop."""

from fastsample.samplers.ddim import DDIM, ddim
from fastsample.samplers.loop import Sampler, Step

__all__ = ["DDIM", "Sampler", "Step", "ddim"]
