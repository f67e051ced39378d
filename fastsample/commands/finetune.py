"""The command `fastsample finetune`."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import nn

from fastsample.commands.console import in_one_line
from fastsample.commands.threads import use_threads
from fastsample.generation.named import FORMS, named_model
from fastsample.lora import Trainable
from fastsample.train.data import ImageData, load_data
from fastsample.train.finetune import FULL, LORA, FinetuneSettings, finetune

HELP = "train a LoRA of a model, or all of it, on a few images"
_SETTINGS = {
    "steps": "optimizer steps",
    "batch_size": "images per step, of each process",
    "lr": "peak learning rate",
    "warmup": "steps until the peak",
    "label_dropout": "share of labels left out, for guidance",
    "seed": "of the LoRA's first weights, of every batch and of what is held out",
}
_FULL_LR = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample finetune`."""
    parser.add_argument(
        "--model",
        default="zoo:digits",
        help=f"{FORMS} (%(default)s)",
    )
    parser.add_argument("--data", required=True, help="images, as for fastsample train")
    parser.add_argument("--out", required=True, type=Path, help="folder for the LoRA, checkpoint and losses")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA (%(default)s)")
    parser.add_argument("--full", action="store_true", help="train the whole model instead")
    parser.add_argument("--targets", nargs="+", help="endings of the names of the layers that get it (all inner ones)")
    parser.add_argument("--held-out", default="0.2", help="share of the images to measure, or others (%(default)s)")
    for field in fields(FinetuneSettings):
        value, text = field.default, _SETTINGS[field.name]
        option = "--" + field.name.replace("_", "-")
        shown = f"{value}, of all weights {_FULL_LR}" if field.name == "lr" else str(value)
        default = None if field.name == "lr" else value
        parser.add_argument(option, type=type(value), default=default, help=f"{text} ({shown})")
    parser.add_argument("--threads", type=int, help="CPU threads (as many as torch likes)")
    parser.add_argument("--device", default="cpu", help="a torch device (%(default)s)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (%(default)s)")


@in_one_line("finetune", stopped="stopped; the same command continues from the last checkpoint")
def run(args: argparse.Namespace) -> int:
    """Trains as the arguments say.

    Returns:
        0 on success; 2 on bad input and 130 on Ctrl-C, with a word on stderr.
    """
    use_threads(args.threads)
    settings = FinetuneSettings(**{name: getattr(args, name) for name in _SETTINGS if name != "lr"})
    lr = args.lr if args.lr is not None else _FULL_LR if args.full else settings.lr
    settings = replace(settings, lr=lr)
    model, data = _module(args.model), load_data(args.data)
    data, held_out = _parts(data, args.held_out, settings.seed)
    made = finetune(
        model,
        data,
        args.out,
        held_out=held_out,
        rank=None if args.full else args.rank,
        targets=args.targets,
        settings=settings,
        device=args.device,
        save_every=args.save_every,
    )
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    print(f"{data.count} images; {trained:,} numbers were trained, the model has {_size(model):,}")
    file = args.out / (LORA if isinstance(made, Trainable) else FULL)
    print(
        f"trained: fastsample.lora.attach(model, {str(file)!r})" if isinstance(made, Trainable) else f"trained: {file}"
    )
    return 0


def _module(text: str) -> nn.Module:
    model, _ = named_model(text)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {text} is no torch module, which alone can be trained, but {type(model).__name__}")
    return model


def _parts(data: ImageData, held_out: str, seed: int) -> tuple[ImageData, ImageData | None]:
    """What is trained on and what is measured."""
    try:
        share = float(held_out)
    except ValueError:
        return data, load_data(held_out)
    if not 0 <= share < 1:
        raise ValueError(f"--held-out must be a share in [0, 1) or a set of images, got {held_out}")
    count = round(share * data.count)
    if count == 0:
        return data, None
    order = torch.randperm(data.count, generator=torch.Generator().manual_seed(seed))

    def of(index: torch.Tensor) -> ImageData:
        return ImageData(data.images[index], None if data.labels is None else data.labels[index])

    return of(order[count:].sort().values), of(order[:count].sort().values)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
