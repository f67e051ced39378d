"""The command `fastsample distill`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fastsample.commands.console import in_one_line
from fastsample.commands.threads import use_threads
from fastsample.distill import (
    Common,
    Settings,
    Student,
    consistency,
    guided,
    lcm,
    lcm_lora,
    load,
    progressive,
    trajectory,
)
from fastsample.distill.consistency import DEFAULTS as CONSISTENCY
from fastsample.distill.consistency import LOSSES as DISTANCES
from fastsample.distill.consistency import SOLVERS
from fastsample.distill.guided import DEFAULTS as GUIDED
from fastsample.distill.lcm import DEFAULTS as LCM
from fastsample.distill.lcm import LOSSES
from fastsample.distill.network import untrained
from fastsample.distill.pairs import CURRICULA
from fastsample.distill.progressive import DEFAULTS as PROGRESSIVE
from fastsample.distill.settings import PRECISIONS
from fastsample.distill.trajectory import DEFAULTS as TRAJECTORY
from fastsample.train.data import load_data
from fastsample.zoo import UNet, digits, load_autoencoder
from fastsample.zoo import load as load_model

HELP = "distil a model to a few steps: trajectory, progressive, guided, consistency, lcm or lcm_lora"
_DEFAULTS = {
    "trajectory": TRAJECTORY,
    "progressive": PROGRESSIVE,
    "guided": GUIDED,
    "consistency": CONSISTENCY,
    "lcm": LCM,
    "lcm_lora": LCM,
}
_SETTINGS = {
    "iterations": "batches of every stage",
    "batch_size": "samples of a batch, of each process",
    "accumulate": "parts that a batch is computed in",
    "lr": "peak learning rate",
    "warmup": "optimizer steps until the peak",
    "weight_decay": "of AdamW",
    "ema_decay": "of averaged weights; 0 keeps the last ones",
    "seed": "of every batch",
}
_METHODS: dict[str, tuple[Callable[..., Student], tuple[str, ...]]] = {
    "progressive": (progressive, ("start", "steps")),
    "guided": (guided, ("start", "steps")),
    "lcm": (lcm, ("scales", "loss", "target_decay")),
    "lcm_lora": (lcm_lora, ("rank", "targets", "scales", "loss", "target_decay")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample distill`, by method."""
    methods = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    one = methods.add_parser("trajectory", help="along the student's own path, without data")
    one.add_argument(
        "--steps", type=int, nargs="+", default=[4], help="of the student; several are for one network (4)"
    )
    one.add_argument("--substeps", type=int, default=6, help="solver steps of the teacher in each (%(default)s)")
    one.add_argument("--paths", type=int, default=4096, help="paths of the teacher to learn from (%(default)s)")
    two = methods.add_parser("progressive", help="half as many steps again and again")
    three = methods.add_parser("consistency", help="every point of a path to its end")
    three.add_argument(
        "--curriculum", choices=tuple(CURRICULA), default="fixed", help="which points meet (%(default)s)"
    )
    three.add_argument("--solver", choices=SOLVERS, default="heun", help="of the teacher's step (%(default)s)")
    three.add_argument("--scales", type=int, default=40, help="noise levels (%(default)s)")
    three.add_argument("--loss", choices=DISTANCES, default="norm", help="the distance (%(default)s)")
    four = methods.add_parser("guided", help="a student of all weights of guidance, and half as many steps again")
    for halved in (two, four):
        halved.add_argument("--start", type=int, default=16, help="steps of the first student (%(default)s)")
        halved.add_argument("--steps", type=int, default=1, help="steps of the last one (%(default)s)")
    five = methods.add_parser("lcm", help="from few points of a path to its end, pixels or latents")
    six = methods.add_parser("lcm_lora", help="the same in a LoRA alone")
    for jumping in (five, six):
        jumping.add_argument("--scales", type=int, default=50, help="timesteps of the teacher (%(default)s)")
        jumping.add_argument("--loss", choices=LOSSES, default="huber", help="(%(default)s)")
    six.add_argument("--rank", type=int, default=8, help="of the LoRA (%(default)s)")
    six.add_argument("--targets", nargs="+", help="endings of the names of the layers that get it (all inner ones)")
    for jumping in (three, five, six):
        jumping.add_argument(
            "--target-decay", type=float, default=0.0, help="of the average aimed at; 0: none (%(default)s)"
        )
    for name, method in methods.choices.items():
        if name != "trajectory":
            method.add_argument("--data", default="mnist5k-train", help="as for fastsample train (%(default)s)")
        _add_common(method, _DEFAULTS[name])


def _add_common(parser: argparse.ArgumentParser, default: Settings) -> None:
    parser.add_argument(
        "--teacher", default="zoo:digits", help="zoo:digits or a file of fastsample train (%(default)s)"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for student, checkpoint and losses")
    parser.add_argument(
        "--student", type=Path, help="a file of fastsample distill to begin with (a copy of the teacher)"
    )
    parser.add_argument("--widths", type=int, nargs="+", help="of a student that begins with nothing, such as 24 48")
    parser.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        default=[1.0],
        help="of the teacher, folded in (1: none); two numbers are a range, of which the student is told one",
    )
    parser.add_argument("--autoencoder", type=Path, help="a file of fastsample autoencoder, of a teacher of latents")
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--clip", type=float, default=(), help="of the teacher's x0 (1; none with --autoencoder)")
    limits.add_argument("--no-clip", dest="clip", action="store_const", const=None, help="leave x0 as it is")
    for name, text in _SETTINGS.items():
        value = getattr(default, name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(value), default=value, help=f"{text} (%(default)s)")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default=default.precision, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (as many as torch likes)")
    parser.add_argument("--device", help="a torch device (cpu)")
    parser.add_argument("--save-every", type=int, default=200, help="iterations between checkpoints (%(default)s)")


@in_one_line("distill", stopped="stopped; the same command continues from the last checkpoint")
def run(args: argparse.Namespace) -> int:
    """Distils as the arguments say.

    Returns:
        0 on success; 2 on bad input and 130 on Ctrl-C, with a word on stderr.
    """
    use_threads(args.threads)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    teacher = digits() if args.teacher == "zoo:digits" else load_model(args.teacher)
    classes = teacher.config.num_classes
    common: Common = {
        "guidance": args.guidance[0] if len(args.guidance) == 1 else tuple(args.guidance),
        "autoencoder": None if args.autoencoder is None else load_autoencoder(args.autoencoder),
        "clip": (1.0 if args.autoencoder is None else None) if args.clip == () else args.clip,
        "student": _student(args, teacher),
        "settings": settings,
        "device": args.device,
        "save_every": args.save_every,
    }
    if classes:
        common["uncond"] = {"y": torch.tensor([classes])}
    shape = (teacher.config.channels, *teacher.config.size)
    if args.method == "trajectory":
        if classes:
            common["cond"] = {"y": torch.arange(classes)}
        student: Student = trajectory(
            teacher, shape, args.out, steps=args.steps, substeps=args.substeps, paths=args.paths, **common
        )
    elif args.method == "consistency":
        student = _consistency(args, teacher, common)
    else:
        method, names = _METHODS[args.method]
        own = {name: getattr(args, name) for name in names}
        student = method(teacher, load_data(args.data), args.out, **own, **common)
    print(f"distilled for {', '.join(map(str, student.steps()))} steps: fastsample.distill.load(...) of {args.out}")
    return 0


def _consistency(args: argparse.Namespace, teacher: UNet, common: Common) -> Student:
    names: dict[str, Any] = {
        name: getattr(args, name) for name in ("curriculum", "solver", "scales", "loss", "target_decay")
    }
    data = load_data(args.data)
    if args.curriculum != "adaptive":
        return consistency(teacher, data, args.out, **names, **common)
    # Training from data alone: the teacher is only what the student begins as.
    alone: Common = {**common, "student": common["student"] or teacher}
    return consistency(None, data, args.out, **names, **alone)


def _student(args: argparse.Namespace, teacher: UNet) -> torch.nn.Module | None:
    if args.student is not None and args.widths is not None:
        raise ValueError("give --student or --widths, not both")
    if args.student is not None:
        return load(args.student).network
    return None if args.widths is None else untrained(teacher, args.widths, args.seed)
