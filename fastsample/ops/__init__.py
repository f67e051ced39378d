"""The ops: public functions, each beside its plain-torch reference."""

from fastsample.ops.noise import randn
from fastsample.ops.posterior import posterior
from fastsample.ops.step import step

__all__ = ["posterior", "randn", "step"]
