"""Training small diffusion models from scratch, and fine-tuning any on a few images."""

from fastsample.train.autoencoder import AutoencoderSettings, train_autoencoder
from fastsample.train.data import ImageData, load_data
from fastsample.train.finetune import FinetuneSettings, finetune
from fastsample.train.latents import LatentData, encoded
from fastsample.train.losses import DiffusionLoss, HybridLoss
from fastsample.train.settings import Settings
from fastsample.train.timesteps import ImportanceTimesteps, UniformTimesteps
from fastsample.train.trainer import train

__all__ = [
    "AutoencoderSettings",
    "DiffusionLoss",
    "FinetuneSettings",
    "HybridLoss",
    "ImageData",
    "ImportanceTimesteps",
    "LatentData",
    "Settings",
    "UniformTimesteps",
    "encoded",
    "finetune",
    "load_data",
    "train",
    "train_autoencoder",
]
