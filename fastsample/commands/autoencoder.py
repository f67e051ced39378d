"""The command `fastsample autoencoder`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from fastsample.commands.console import in_one_line
from fastsample.commands.threads import use_threads
from fastsample.train.autoencoder import AutoencoderSettings, train_autoencoder
from fastsample.train.data import load_data

HELP = "train a small autoencoder, for models of latents"
_SETTINGS = {
    "steps": "optimizer steps",
    "batch_size": "images per step, of each process",
    "lr": "peak learning rate",
    "warmup": "steps until the peak",
    "kl_weight": "of the latents' divergence from standard normals",
    "latent_channels": "of the latents, a quarter of the size of the images",
    "width": "channels at half the size of the images",
    "seed": "of the first weights and of every batch",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample autoencoder`; their defaults made the bundled one."""
    parser.add_argument("--data", required=True, help="square images, as for fastsample train")
    parser.add_argument("--out", required=True, type=Path, help="folder for autoencoder, checkpoint and losses")
    for field in fields(AutoencoderSettings):
        value, text = field.default, _SETTINGS[field.name]
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(value), default=value, help=f"{text} (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (as many as torch likes)")
    parser.add_argument("--device", default="cpu", help="a torch device (%(default)s)")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (%(default)s)")


@in_one_line("autoencoder", stopped="stopped; the same command continues from the last checkpoint")
def run(args: argparse.Namespace) -> int:
    """Trains as the arguments say.

    Returns:
        0 on success; 2 on bad input and 130 on Ctrl-C, with a word on stderr.
    """
    use_threads(args.threads)
    settings = AutoencoderSettings(**{name: getattr(args, name) for name in _SETTINGS})
    train_autoencoder(load_data(args.data), args.out, settings, device=args.device, save_every=args.save_every)
    print(f"trained: fastsample.zoo.load_autoencoder({str(args.out / 'autoencoder.safetensors')!r})")
    return 0
