"""The command `fastsample nll`: bits per dimension of a set of images under a model."""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastsample.checks import usable_device
from fastsample.commands.console import in_one_line
from fastsample.commands.outputs import check_out
from fastsample.commands.threads import use_threads
from fastsample.likelihood import BitsPerDimension, nll
from fastsample.samplers.ddpm import DDPM, VARIANCES
from fastsample.storage.writing import replace_text
from fastsample.train.data import ImageData, load_data
from fastsample.zoo import UNet, digits, load

HELP = "bits per dimension of images under a model"
_STEPS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample nll`."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help="mnist5k-held-out (1,000 digits that no model here was trained on), mnist5k, an .npz file or a folder",
    )
    parser.add_argument("--model", type=Path, help="a file of `fastsample train` (the bundled digits model)")
    parser.add_argument("--steps", type=int, help=f"model calls an image ({_STEPS}, or all timesteps where fewer)")
    parser.add_argument("--timesteps", default="respaced", help="which ones, as fastsample.DDPM takes it (%(default)s)")
    parser.add_argument("--variance", choices=VARIANCES, help="of the steps (learned_range where the model has one)")
    parser.add_argument("--batch-size", type=int, default=50, help="images a model call (%(default)s)")
    parser.add_argument("--count", type=int, help="only so many images, evenly spread over the data (all)")
    parser.add_argument("--seed", type=int, default=0, help="noise seed (%(default)s)")
    parser.add_argument("--unlabelled", action="store_true", help="leave out the labels of the data")
    parser.add_argument("--threads", type=int, help="CPU threads (as many as torch likes)")
    parser.add_argument("--device", default="cpu", help="a torch device (%(default)s)")
    parser.add_argument("--out", type=Path, help="a .csv file to write, a row for each image")


@in_one_line("nll")
def run(args: argparse.Namespace) -> int:
    """Prints the mean of the bound with its standard error, and its parts.

    The noise of an image depends on the seed and on its place in the data, not on the batch size or the count.

    Returns:
        0 on success; 2 on bad input and 130 on Ctrl-C, with a word on stderr.
    """
    for name in ("batch_size", "count"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    use_threads(args.threads)
    device = usable_device(args.device)
    if args.out is not None:
        check_out(args.out, (".csv",))
    model = (digits() if args.model is None else load(args.model)).to(device)
    process = _process(model, args)
    data = load_data(args.data)
    _check_images(data, model, args.data)
    labels = None if args.unlabelled else _labels(data, model)
    places = _places(len(data.images), args.count)
    batches = tqdm(places.split(args.batch_size), disable=None, unit="batch", leave=False)
    bits = _joined(_bits(batches, data, labels, model, process, args.seed, device))
    _print(bits, args.data, labels is not None, process)
    if args.out is not None:
        replace_text(args.out, _csv(bits, places, data.labels))
        print(f"{args.out}: a row for each image")
    return 0


def _process(model: UNet, args: argparse.Namespace) -> DDPM:
    """The steps of the bound, as a sampler would make them."""
    variance = args.variance or model.variance
    if variance.startswith("learned") and not model.config.learned_variance:
        raise ValueError(
            f"--variance {variance}: the model has no variance of its own, only fixed_small and fixed_large"
        )
    return DDPM(
        model.schedule,
        steps=min(_STEPS, model.schedule.T) if args.steps is None else args.steps,
        timesteps=args.timesteps,
        variance=variance,
        prediction=model.prediction,
        clip=1.0,
    )


def _check_images(data: ImageData, model: UNet, source: str) -> None:
    wanted = (model.config.channels, *model.config.size)
    if (given := tuple(data.images.shape[1:])) != wanted:
        given_text, wanted_text = (" x ".join(map(str, shape)) for shape in (given, wanted))
        raise ValueError(
            f"images of {source} are {given_text} (channels, height, width), and the model takes {wanted_text}"
        )


def _labels(data: ImageData, model: UNet) -> Tensor | None:
    """The labels that the model is given; None where either has none."""
    classes = model.config.num_classes
    if data.labels is None or classes == 0:
        return None
    if data.num_classes > classes:
        raise ValueError(
            f"labels go up to {data.num_classes - 1}, and the model has {classes} classes, 0 to {classes - 1}: "
            "--unlabelled leaves them out"
        )
    return data.labels


def _places(total: int, count: int | None) -> Tensor:
    """Evenly spread over the data, which may be sorted by class."""
    if count is None:
        return torch.arange(total)
    if count > total:
        raise ValueError(f"--count {count}: there are {total} images")
    return torch.arange(count) * total // count


def _bits(
    batches: tqdm[Tensor],
    data: ImageData,
    labels: Tensor | None,
    model: UNet,
    process: DDPM,
    seed: int,
    device: torch.device,
) -> Iterator[BitsPerDimension]:
    for places in batches:
        keywords = None if labels is None else {"y": labels[places].to(device)}
        yield nll(
            model,
            data.scaled(places).to(device),
            schedule=process.schedule,
            steps=process.steps,
            timesteps=process.timesteps,
            variance=process.variance,
            prediction=process.prediction,
            clip=process.clip,
            seed=seed,
            index=places,
            model_kwargs=keywords,
        )


def _joined(parts: Iterator[BitsPerDimension]) -> BitsPerDimension:
    """All samples as one result, on the CPU."""
    kept = list(parts)
    names = ("total_bpd", "prior_bpd", "vb", "x0_mse", "mse")
    tensors = {name: torch.cat([getattr(part, name) for part in kept]).cpu() for name in names}
    return BitsPerDimension(**tensors, timesteps=kept[0].timesteps)


def _print(bits: BitsPerDimension, source: str, labelled: bool, process: DDPM) -> None:
    count = len(bits.total_bpd)
    given = "given their labels" if labelled else "without labels"
    spacing = "" if process.timesteps == "respaced" else f" ({process.timesteps})"
    print(
        f"{count} images of {source}, {given}; {process.steps} of {process.schedule.T} timesteps{spacing}, "
        f"variance {process.variance}"
    )
    parts = {
        "bits/dim": bits.total_bpd,
        "  prior": bits.prior_bpd,
        "  steps": bits.vb[:, :-1].sum(dim=1),
        "  decoder": bits.vb[:, -1],
    }
    for name, values in parts.items():
        error = f" +- {float(values.double().std()) / math.sqrt(count):.2g}" if count > 1 else ""
        print(f"{name:<12}{float(values.double().mean()):.5g}{error}")
    print("(means and their standard errors)" if count > 1 else "(of one image)")


def _csv(bits: BitsPerDimension, places: Tensor, labels: Tensor | None) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("place", "label", "total_bpd", "prior_bpd", "decoder_bpd"))
    columns = (bits.total_bpd, bits.prior_bpd, bits.vb[:, -1])
    shown = [[f"{value:.6g}" for value in column.tolist()] for column in columns]
    of_image = places.tolist(), [""] * len(places) if labels is None else labels[places].tolist()
    writer.writerows(zip(*of_image, *shown, strict=True))
    return text.getvalue()
