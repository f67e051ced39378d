"""The command `fastsample sample`: some samples of a trained model, as one picture or as arrays."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastsample.commands import sampling
from fastsample.commands.console import in_one_line
from fastsample.commands.outputs import check_out
from fastsample.commands.threads import use_threads
from fastsample.generation import Chunk, Recipe
from fastsample.generation.source import Source
from fastsample.generation.work import Place, source_of
from fastsample.images import PICTURES, picture_format, save_grid
from fastsample.storage.writing import replacing
from fastsample.zoo import load_autoencoder

HELP = "draw a few samples of a trained model: a picture, or an .npz file"
_ARRAYS = ".npz"
_MOST_AT_ONCE = 64  # samples of a call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample sample`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="a picture (.png, .jpg, .jpeg, .webp), or .npz of images, uint8 (N, H, W, C), and labels (%(default)s)",
    )
    sampling.add_arguments(parser)
    parser.add_argument("--num", type=int, default=16, help="samples (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all noise (%(default)s)")
    parser.add_argument("--columns", type=int, help="of the picture (as many as rows, or one more)")
    parser.add_argument("--model-batch", type=int, help=f"samples of each call of the model (at most {_MOST_AT_ONCE})")
    parser.add_argument("--threads", type=int, help="CPU threads (as many as torch likes)")
    parser.add_argument("--device", help="a torch device (the model's)")


@in_one_line("sample")
def run(args: argparse.Namespace) -> int:
    """Draws as the arguments say. What is at --out is replaced, and a line on stderr says so beforehand.

    Returns:
        0 on success; 2 on bad input and 130 on Ctrl-C, with a word on stderr.
    """
    check_out(args.out, (*PICTURES, _ARRAYS))
    is_picture = args.out.suffix.lower() != _ARRAYS
    if is_picture:
        picture_format(args.out)
    if args.columns is not None and (args.columns < 1 or not is_picture):
        raise ValueError(f"--columns are of a picture, and at least 1, got {args.columns} for {args.out}")
    use_threads(args.threads)
    model = sampling.model_text(args.model)
    autoencoder = None if args.autoencoder is None else load_autoencoder(args.autoencoder)
    size = _calls_of(args.num) if args.model_batch is None else args.model_batch
    recipe = Recipe(model, num=args.num, seed=args.seed, batch=size, model_batch=size, **sampling.choices_of(args))
    with source_of(model, recipe, Place(args.out, args.device, autoencoder)) as source:
        if is_picture and source.shape[0] not in (1, 3):
            raise ValueError(
                f"--out: a picture has 1 or 3 channels, these samples have {source.shape[0]}: name an .npz"
            )
        if args.out.exists():
            print(f"{args.out} is there and will be replaced", file=sys.stderr)
        drawn = _drawn(source, recipe)
    if is_picture:
        images = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float()
        save_grid(images, args.out, columns=args.columns, value_range=(0, 255))
    else:
        _write_arrays(args.out, drawn)
    print(f"{args.out}: {_told(recipe, source, drawn)}")
    return 0


def _calls_of(num: int) -> int:
    """Samples of a call, so that the fewest calls are made, of about one size: what is missing is filled up."""
    calls = -(-max(num, 1) // _MOST_AT_ONCE)
    return -(-max(num, 1) // calls)


def _drawn(source: Source, recipe: Recipe) -> Chunk:
    """All samples."""
    with tqdm(total=recipe.chunks * source.rows, unit=" steps", disable=None, leave=False) as bar:
        chunks = [source.chunk(places, lambda step: bar.update()) for places in recipe.parts()]
    images = np.concatenate([chunk.images for chunk in chunks])
    labels = [chunk.labels for chunk in chunks if chunk.labels is not None]
    return Chunk(0, images, np.concatenate(labels) if labels else None)


def _write_arrays(path: Path, drawn: Chunk) -> None:
    arrays = {"images": drawn.images} | ({} if drawn.labels is None else {"labels": drawn.labels})
    with replacing(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # of which none is called allow_pickle


def _told(recipe: Recipe, source: Source, drawn: Chunk) -> str:
    """What was drawn, as text."""
    shape = " x ".join(map(str, source.shape))
    classes = "" if drawn.labels is None else f", classes {' '.join(map(str, dict.fromkeys(drawn.labels.tolist())))}"
    guidance = "" if recipe.guidance is None else f", guidance {recipe.guidance:g}"
    return (
        f"{recipe.num} samples, {shape}, of {recipe.model}{classes}: "
        f"{source.name}, {source.rows} model calls each{guidance}, seed {recipe.seed}"
    )
