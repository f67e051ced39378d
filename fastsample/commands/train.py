"""The command `fastsample train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastsample.commands.console import in_one_line
from fastsample.commands.threads import use_threads
from fastsample.train.data import load_data
from fastsample.train.latents import encoded
from fastsample.train.losses import LOSSES, PREDICTIONS, VARIANCES
from fastsample.train.settings import SCHEDULES, Settings
from fastsample.train.timesteps import TIMESTEP_SAMPLERS
from fastsample.train.trainer import check_place, train
from fastsample.zoo import load_autoencoder

HELP = "train a small U-Net as the bundled model was trained"
_SETTINGS = {
    "steps": "optimizer steps; a run can be extended by more",
    "batch_size": "images per step, of each process",
    "lr": "peak learning rate",
    "warmup": "steps until the peak",
    "cooldown": "share of the steps in which the learning rate falls to 0",
    "weight_decay": "of AdamW",
    "ema_decay": "of the averaged weights, the ones that are kept",
    "label_dropout": "share of labels left out, for guidance",
    "timesteps": "T of the schedule",
    "seed": "of the first weights and of every batch",
}
_CHOICES = {
    "schedule": (SCHEDULES, "of betas"),
    "loss": (LOSSES, "what is minimised"),
    "prediction": (PREDICTIONS, "what the model returns"),
    "target": (
        PREDICTIONS,
        "what its network gives and the error is taken of; by default v for epsilon, else the prediction",
    ),
    "variance": (VARIANCES, "of the steps; by default learned_range, and fixed_small for --loss simple"),
    "timestep_sampler": (tuple(TIMESTEP_SAMPLERS), "which t a step looks at"),
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
        parser.add_argument(_option(name), type=type(value), default=value, help=f"{text} (%(default)s)")
    for name, (choices, text) in _CHOICES.items():
        value = getattr(default, name)
        shown = "" if value is None else " (%(default)s)"
        parser.add_argument(_option(name), choices=choices, default=value, help=text + shown)
    text = "channels at each resolution, the last ones halved (from the size of the images)"
    parser.add_argument("--widths", type=int, nargs="+", default=default.widths, help=text)
    parser.add_argument(
        "--autoencoder", type=Path, help="a file of fastsample autoencoder: the model is one of its latents"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (as many as torch likes)")
    parser.add_argument("--device", default="cpu", help="a torch device (%(default)s)")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (%(default)s)")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@in_one_line("train", stopped="stopped; the same command continues from the last checkpoint")
def run(args: argparse.Namespace) -> int:
    """Trains as the arguments say.

    Returns:
        0 on success; 2 on bad input and 130 on Ctrl-C, with a word on stderr.
    """
    use_threads(args.threads)
    widths = None if args.widths is None else tuple(args.widths)
    settings = Settings(widths=widths, **{name: getattr(args, name) for name in (*_SETTINGS, *_CHOICES)})
    check_place(args.out, args.device, args.save_every)
    data = load_data(args.data)
    latents = None if args.autoencoder is None else encoded(data, load_autoencoder(args.autoencoder))
    train(latents or data, args.out, settings, device=args.device, save_every=args.save_every)
    print(f"trained: fastsample.zoo.load({str(args.out / 'model.safetensors')!r})")
    return 0
