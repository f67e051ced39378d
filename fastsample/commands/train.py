"""The command `fastsample train`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastsample.commands.console import in_one_line
from fastsample.train.data import load_data
from fastsample.train.trainer import Settings, check_place, train

HELP = "train a small U-Net as the bundled model was trained"
_MOST_THREADS = 4096
_SETTINGS = {
    "steps": "optimizer steps",
    "batch_size": "images per step",
    "lr": "peak learning rate",
    "warmup": "steps until the peak",
    "weight_decay": "of AdamW",
    "ema_decay": "of the averaged weights, the ones that are kept",
    "label_dropout": "share of labels left out, for guidance",
    "timesteps": "T of the cosine schedule",
    "seed": "of the first weights and of every batch",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample train`; their defaults made the bundled digits model."""
    default = Settings()
    parser.add_argument(
        "--data", required=True, help="mnist5k, mnist5k-train (4,000 of it), an .npz file, or a folder of images"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for model, checkpoint and losses")
    for name, text in _SETTINGS.items():
        value = getattr(default, name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(value), default=value, help=f"{text} (%(default)s)")
    text = "channels at 1/2 and 1/4 resolution %(default)s"
    parser.add_argument("--widths", type=int, nargs=2, default=default.widths, help=text)
    parser.add_argument("--threads", type=int, help="CPU threads (as many as torch likes)")
    parser.add_argument("--device", default="cpu", help="a torch device (%(default)s)")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (%(default)s)")


@in_one_line("train", stopped="stopped; the same command continues from the last checkpoint")
def run(args: argparse.Namespace) -> int:
    """Trains as the arguments say.

    Returns:
        0 on success; 2 on bad input and 130 on Ctrl-C, with a word on stderr.
    """
    if args.threads is not None:
        if not 1 <= args.threads <= _MOST_THREADS:
            raise ValueError(f"--threads must be from 1 to {_MOST_THREADS}, got {args.threads}")
        torch.set_num_threads(args.threads)
    settings = Settings(widths=tuple(args.widths), **{name: getattr(args, name) for name in _SETTINGS})
    check_place(args.out, args.device, args.save_every)
    train(load_data(args.data), args.out, settings, device=args.device, save_every=args.save_every)
    print(f"trained: fastsample.zoo.load({str(args.out / 'model.safetensors')!r})")
    return 0
