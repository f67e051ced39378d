"""The command `fastsample generate`."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastsample.commands import sampling
from fastsample.commands.console import in_one_line
from fastsample.generation import Recipe, generate
from fastsample.generation.folder import Folder
from fastsample.generation.formats import FORMATS
from fastsample.generation.run import ENGINES, check_engine
from fastsample.generation.work import Place, source_of
from fastsample.zoo import load_autoencoder

HELP = "draw a set of samples into a folder, by one process or many, and go on where it ended"
_NUMBERS = {
    "num": "samples",
    "seed": "of all noise",
    "batch": "samples of a chunk, which is written and handed out as a whole",
    "model_batch": "samples of each call of the model",
    "threads": "CPU threads of every process",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample generate`."""
    parser.add_argument("--out", required=True, type=Path, help="the folder")
    sampling.add_arguments(parser)
    defaults = {field.name: field.default for field in fields(Recipe)}
    for name, text in _NUMBERS.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=defaults[name], help=f"{text} (%(default)s)")
    parser.add_argument("--format", choices=tuple(FORMATS), default=defaults["format"], help="of chunks (%(default)s)")
    parser.add_argument("--engine", choices=ENGINES, default="torch", help="torchrun's processes or Ray (%(default)s)")
    parser.add_argument("--workers", type=int, help="of Ray (one per CPU, or per GPU)")
    parser.add_argument("--device", help="a torch device (the model's)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end")


@in_one_line("generate", stopped="stopped; the same command goes on with the next chunk")
def run(args: argparse.Namespace) -> int:
    """Draws as the arguments say.

    Returns:
        0 on success; 2 on bad input and 130 on Ctrl-C, with a word on stderr.
    """
    choices = sampling.choices_of(args) | {name: getattr(args, name) for name in ("format", *_NUMBERS)}
    autoencoder = None if args.autoencoder is None else load_autoencoder(args.autoencoder)
    if args.dry_run:
        check_engine(args.engine, args.workers)
        print(plan(args.model, Place(args.out, args.device, autoencoder), choices))
        return 0
    how = {"engine": args.engine, "workers": args.workers, "device": args.device, "autoencoder": autoencoder}
    out = generate(args.model, args.out, **how, **choices)
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun one speaks
        print(f"{args.num:,} samples in {out}; one file: fastsample merge {shlex.quote(str(out))} FILE.npz")
    return 0


def plan(model: str, place: Place, choices: Mapping[str, Any]) -> str:
    """What would be done, as text."""
    recipe = Recipe(model, **choices)
    with source_of(model, recipe, place) as source:
        folder = Folder(place.out, source.settings())
    folder.check()
    shape, there = source.shape, recipe.chunks - len(folder.missing())
    size = recipe.model_batch
    calls = sum(-(-(places.start % size + len(places)) // size) for places in recipe.parts())
    share, pixels = recipe.num / (calls * size), " x ".join(map(str, shape))
    return "\n".join(
        (
            f"{recipe.num:,} samples, {pixels}, of {model}: {math.prod(shape) * recipe.num:,} bytes",
            f"{source.calls} model calls a sample, {size} samples a call, {share:.0%} of them wanted",
            f"{recipe.chunks:,} chunks of {recipe.batch} samples, {recipe.format}, {there:,} of them there by name",
        )
    )
