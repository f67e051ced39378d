"""The command `fastsample evaluate`: what samples are worth, beside what real images are."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fastsample.commands.console import in_one_line
from fastsample.commands.threads import use_threads
from fastsample.generation.named import named_function

if TYPE_CHECKING:
    from fastsample.evaluate import Evaluation, Figure

HELP = "measure samples against real images: distances, precision, recall, classes, copies"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample evaluate`."""
    parser.add_argument(
        "samples",
        metavar="SAMPLES",
        help="an .npz file (images uint8, or floating point in [-1, 1], and labels), a folder of images, or one of "
        "fastsample generate",
    )
    parser.add_argument(
        "--reference", default="mnist5k", help="mnist5k, an .npz file or a folder of real images (%(default)s)"
    )
    parser.add_argument(
        "--labels", type=Path, help="a file of the samples' classes: .npz, .npy or text; default those of SAMPLES"
    )
    parser.add_argument(
        "--features",
        help="what images are compared by: classifier (for mnist5k), inception, pixels, or python:MODULE:FUNCTION, "
        "from float32 (N, C, H, W) in [-1, 1] to (N, D)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and the real images (%(default)s)")
    parser.add_argument("--draws", type=int, default=200, help="of the bootstrap (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (as many as torch likes)")
    parser.add_argument("--json", action="store_true", help="the figures as JSON instead of a table")


@in_one_line("evaluate")
def run(args: argparse.Namespace) -> int:
    """Prints every figure.

    Returns:
        0 on success; 2 on bad input and 130 on Ctrl-C, with a word on stderr.
    """
    from fastsample.evaluate import evaluate  # it brings the training data's readers, which no other command needs
    from fastsample.evaluate.sources import load_labels

    use_threads(args.threads)
    labels = None if args.labels is None else load_labels(args.labels)
    features = args.features
    if features is not None and features.startswith("python:"):
        features = named_function(features, "--features")
    evaluation = evaluate(
        args.samples, args.reference, labels=labels, features=features, seed=args.seed, draws=args.draws
    )
    print(json.dumps(asdict(evaluation)) if args.json else table(evaluation, args.samples, args.reference))
    return 0


def table(evaluation: Evaluation, samples: str, reference: str) -> str:
    """The figures as text, of the samples and of real images."""
    ours, real = evaluation.samples, evaluation.real
    rows: list[tuple[str, Figure | None, Figure | None]] = [
        ("Frechet distance", ours.frechet, real.frechet),
        ("kernel distance", ours.kernel, real.kernel),
        ("precision", ours.precision, real.precision),
        ("recall", ours.recall, real.recall),
        ("class agreement", evaluation.class_agreement, evaluation.real_class_agreement),
        ("nearest trained-on image", evaluation.nearest, evaluation.real_nearest),
    ]
    lines = [
        f"{ours.count} samples of {samples} against {ours.reference_count} images of {reference}; "
        f"features: {evaluation.features}",
        f"real: {real.count} of the reference against its other {real.reference_count}; in brackets 5 to 95 %",
        f"{'':<26}{'samples':<34}  real",
        *(f"{name:<26}{_shown(mine):<34}  {_shown(theirs)}" for name, mine, theirs in rows),
    ]
    return "\n".join(lines)


def _shown(figure: Figure | None) -> str:
    return "-" if figure is None else str(figure)
