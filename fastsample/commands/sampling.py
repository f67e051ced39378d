"""What commands that draw samples are told: which model, and how it is sampled."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastsample.generation import FORMS
from fastsample.generation.recipe import SCHEDULES
from fastsample.generation.source import OWN, SAMPLERS

CHOICES = ("sampler", "steps", "guidance", "classes", "null_class", "shape", "schedule")  # as in generation.Recipe
_TRAINED = ("model.safetensors", "student.safetensors")  # of fastsample train and distill
_OF_DIFFUSERS = ("config.json", "model_index.json")
CHECKPOINTS = ("checkpoint.pt", "trunk.pt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name a model and say how it is sampled."""
    parser.add_argument("--model", default="zoo:digits", help=f"{FORMS} (%(default)s)")
    parser.add_argument("--sampler", choices=(*SAMPLERS, OWN), help=f"(ddim; of a student {OWN})")
    parser.add_argument("--steps", type=int, help="of the sampler (50; of a student the most that it has)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (none)")
    parser.add_argument("--classes", type=int, nargs="+", help="that the samples have in turn (all of the model's)")
    parser.add_argument("--null-class", type=int, help="that stands for none, under guidance (the model's own)")
    parser.add_argument("--shape", type=int, nargs="+", help="of a sample: channels, height, width (the model's own)")
    parser.add_argument("--schedule", choices=tuple(SCHEDULES), help="of a model that says none")
    parser.add_argument("--autoencoder", type=Path, help="a file of fastsample autoencoder, of a model of latents")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further argument of the sampler, such as eta=1.0 or clip=null; may be repeated",
    )


def choices_of(args: argparse.Namespace) -> dict[str, Any]:
    """What they say of a generation.Recipe."""
    return {name: getattr(args, name) for name in CHOICES} | {"arguments": _options(args.option)}


def model_text(text: str) -> str:
    """One of the FORMS for what names a model, among which are a file or folder of a run, or its checkpoint.

    Example:
        >>> model_text("zoo:digits")
        'zoo:digits'
    """
    path = Path(text)
    if path.name in CHECKPOINTS and path.is_file():
        path = path.parent  # the averaged weights lie beside it
    if path.is_file():
        return f"zoo:{path}"
    for name in _TRAINED:
        if (path / name).is_file():
            return f"zoo:{path / name}"
    if any((path / name).is_file() for name in _OF_DIFFUSERS):
        return f"diffusers:{path}"
    return text


def _options(options: list[str]) -> dict[str, Any]:
    arguments = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not name or not equals:
            raise ValueError(f"--option must be NAME=VALUE, got {option!r}")
        try:
            arguments[name] = json.loads(value)
        except ValueError:  # a text, such as timesteps=karras
            arguments[name] = value
    return arguments
