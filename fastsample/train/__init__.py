"""Training small diffusion models from scratch."""

from fastsample.train.data import ImageData, load_data
from fastsample.train.losses import HybridLoss
from fastsample.train.trainer import Settings, train

__all__ = ["HybridLoss", "ImageData", "Settings", "load_data", "train"]
