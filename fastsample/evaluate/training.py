"""Trains the bundled digits classifier: `python -m fastsample.evaluate.training --out FILE`, a minute on one thread.

It learns from the 4,000 digits of "mnist5k-train". What it is worth is told by the 1,000 of "mnist5k-held-out", which
chose nothing here: the settings below are those that did well with --validate, which learns from 3,500 of the 4,000 and
counts the right ones among the other 500. The seed is 0 and was not chosen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fastsample.evaluate.classifier import DigitsClassifier
from fastsample.storage.writing import check_replaceable, replacing
from fastsample.train.data import ImageData, load_data

SEED, STEPS, BATCH, LR, EMA_DECAY = 0, 2000, 64, 3e-3, 0.995
MOST_SHIFT, AFFINE = 2, 0.12  # pixels; standard deviation of the entries of a 2 x 2 matrix around the identity
_EVERY = 8  # with --validate, one digit in so many is left out


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, writes the weights and tells how many digits are read rightly."""
    parser = argparse.ArgumentParser(prog="python -m fastsample.evaluate.training", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="the .safetensors file to write")
    where.add_argument("--validate", action="store_true", help="write nothing, look at no held-out digit")
    arguments = parser.parse_args(argv)
    if arguments.out is not None:
        check_replaceable(arguments.out)
    torch.set_num_threads(1)  # sums in one order: the same weights again on the same machine
    data = load_data("mnist5k-train")
    left_out = torch.arange(len(data.images)) % _EVERY == 0
    if arguments.validate:
        model = train(data, (~left_out).nonzero()[:, 0])
        print(f"{accuracy(model, data, left_out.nonzero()[:, 0]):.2%} of {int(left_out.sum())} of the 4,000")
        return 0
    model = train(data, torch.arange(len(data.images)))
    with replacing(arguments.out) as file:
        file.write(safetensors.torch.save(model.state_dict()))
    judges = load_data("mnist5k-held-out")
    print(f"{accuracy(model, judges, torch.arange(len(judges.images))):.2%} of the 1,000 held-out digits")
    return 0


def train(data: ImageData, index: Tensor, steps: int = STEPS, seed: int = SEED) -> DigitsClassifier:
    """A classifier of the labelled images at index, in eval mode: the moving average of AdamW's weights."""
    assert data.labels is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsClassifier()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
        optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.05)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps)
        for _ in tqdm(range(steps), desc="classifier", unit="step"):
            chosen = index[torch.randint(len(index), (BATCH,))]
            loss = functional.cross_entropy(model(varied(data.scaled(chosen))), data.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            average.update_parameters(model)
    averaged = average.module.eval()
    assert isinstance(averaged, DigitsClassifier)
    return averaged


def varied(images: Tensor) -> Tensor:
    """Images (N, 1, H, W) in [-1, 1], each a little turned, sheared, scaled and shifted; edges are black."""
    count, _, height, width = images.shape
    affine = torch.eye(2, 3).repeat(count, 1, 1)
    affine[:, :, :2] += AFFINE * torch.randn(count, 2, 2)
    # The grid's unit is half an image.
    affine[:, :, 2] = (2 * torch.rand(count, 2) - 1) * MOST_SHIFT * 2 / torch.tensor([width, height])
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


def accuracy(model: DigitsClassifier, data: ImageData, index: Tensor) -> float:
    """The share of the labelled images at index whose class is read rightly."""
    assert data.labels is not None
    return float((model.look(data.scaled(index)).classes == data.labels[index]).float().mean())


if __name__ == "__main__":
    raise SystemExit(main())
