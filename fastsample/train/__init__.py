"""Training small diffusion models from scratch."""

from fastsample.train.data import ImageData, load_data
from fastsample.train.losses import DiffusionLoss, HybridLoss
from fastsample.train.settings import Settings
from fastsample.train.timesteps import ImportanceTimesteps, UniformTimesteps
from fastsample.train.trainer import train

__all__ = [
    "DiffusionLoss",
    "HybridLoss",
    "ImageData",
    "ImportanceTimesteps",
    "Settings",
    "UniformTimesteps",
    "load_data",
    "train",
]
