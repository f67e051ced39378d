"""The ops: public functions, each beside its plain-torch reference."""

from fastsample.ops.noise import randn
from fastsample.ops.step import step

__all__ = ["randn", "step"]
