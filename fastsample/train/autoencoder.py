"""Training an autoencoder; interrupted runs continue bit for bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Generator, Tensor

from fastsample.checks import integer, real
from fastsample.train import place
from fastsample.train.checkpoint import CHECKPOINT, State
from fastsample.train.data import ImageData
from fastsample.train.processes import Processes
from fastsample.train.task import Task
from fastsample.zoo.autoencoder import Autoencoder, AutoencoderConfig
from fastsample.zoo.autoencoder_store import save_autoencoder

_FILE = "autoencoder.safetensors"
_BATCH = 250


@dataclass(frozen=True)
class AutoencoderSettings:
    """What decides the outcome of a run; the defaults made the bundled autoencoder.

    Args:
        steps: optimizer steps.
        batch_size: images per step, of each process.
        lr: peak learning rate of AdamW, reached after `warmup` steps, from where it falls to 0 linearly.
        kl_weight: of the divergence of the encoder's distribution from a standard normal, per number of the latents,
            beside the mean square error per number of the images.
        latent_channels, width: see zoo.AutoencoderConfig.
        seed: of the first weights and of every batch.

    Raises:
        ValueError, TypeError: a value out of its range, or of another type.
    """

    steps: int = 4000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 200
    kl_weight: float = 1e-3
    latent_channels: int = 4
    width: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        # As Python's own numbers, which checkpoints hold.
        for name in ("steps", "batch_size", "latent_channels", "width"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1))
        object.__setattr__(self, "warmup", integer("warmup", self.warmup, 0))
        object.__setattr__(self, "seed", integer("seed", self.seed, 0, 2**64 - 1))
        for name in ("lr", "kl_weight"):
            object.__setattr__(self, name, real(name, getattr(self, name)))
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.kl_weight < float("inf"):
            raise ValueError(f"kl_weight must not be negative, got {self.kl_weight}")


def train_autoencoder(
    data: ImageData,
    out: str | Path,
    settings: AutoencoderSettings | None = None,
    *,
    device: str | torch.device = "cpu",
    save_every: int = 500,
    progress: bool = True,
) -> Autoencoder:
    """Trains an autoencoder (Kingma & Welling 2013) on square images and returns it.

        loss = mean (x - decoder(mean + std z))^2 + kl_weight mean (mean^2 + std^2 - 1 - ln std^2) / 2

    with mean and std of the encoder for images x in [-1, 1]. Every save_every steps and at the end `out` gets
    autoencoder.safetensors, in half precision, checkpoint.pt, loss.csv and loss.png. A run on a folder with a
    checkpoint continues it, with the same outcome as one that was never interrupted.

    Args:
        data: the images; their labels do not count.
        out: the folder.
        settings: what decides the outcome.
        device: where to compute.
        save_every: steps between checkpoints.
        progress: show a tqdm bar.

    Raises:
        ValueError: images that are not square or whose size 4 does not divide, or `out` holds files of something else
            or another run. OSError: out cannot be written. RuntimeError: another run uses out.
        ArithmeticError: the loss, its gradient or a weight is not finite; the last checkpoint is from before that.
    """
    place.check_place(Path(out), (_FILE,), (CHECKPOINT,), device, save_every)
    _, height, width = data.shape
    if height != width:
        raise ValueError(f"images must be square, got {height} x {width}")
    task = _Task(data, settings or AutoencoderSettings(), Processes(device))
    task.go(Path(out), save_every, progress)
    return cast(Autoencoder, task.model.eval())


class _Task(Task):
    command, files, reported = "fastsample autoencoder", (_FILE,), ("loss", "mse", "kl")

    def __init__(self, data: ImageData, settings: AutoencoderSettings, processes: Processes) -> None:
        config = AutoencoderConfig(
            channels=data.shape[0],
            image_size=data.shape[1],
            latent_channels=settings.latent_channels,
            width=settings.width,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = Autoencoder(config).to(processes.device)
        self.data, self.settings = data, settings
        super().__init__(
            model,
            processes,
            steps=settings.steps,
            warmup=settings.warmup,
            lr=settings.lr,
            ema_decay=0.0,
            seed=settings.seed,
        )

    def identity(self) -> State:
        settings = asdict(self.settings)
        settings["batch_size"] *= self.processes.count
        return settings | {"data": self.data.digest()}

    def losses(self, generator: Generator) -> tuple[Tensor, ...]:
        size, model = self.settings.batch_size, cast(Autoencoder, self.model)
        x = self.data.scaled(self.draw(self.data.count, size, generator)).to(self.device)
        back, mean, log_variance = self.called(x, self.normals((size, *model.config.latent_shape), generator))
        mse = (back - x).square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return mse + self.settings.kl_weight * kl, mse, kl

    @torch.no_grad()
    def evaluated(self, step: int) -> None:
        """Takes mean and standard deviation of the encoder's means, in every process alike."""
        model = cast(Autoencoder, self.model)
        parts = [
            model.distribution(self.data.scaled(index).to(self.device))[0]
            for index in torch.arange(self.data.count, device="cpu").split(_BATCH)
        ]
        latents = torch.cat(parts).double()
        model.mean.copy_(latents.mean((0, 2, 3)).reshape(model.mean.shape))
        model.std.copy_(latents.std((0, 2, 3)).reshape(model.std.shape))

    def publish(self, out: Path) -> None:
        save_autoencoder(cast(Autoencoder, self.model), out / _FILE, torch.float16)
