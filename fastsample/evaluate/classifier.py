"""The digits classifier: what `fastsample evaluate` sees digits with, and what reads their class."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURES, CLASSES, SHAPE = 64, 10, (1, 28, 28)
WEIGHTS = Path(__file__).with_name("digits_classifier.safetensors")
_WIDTHS, _DROPOUT, _BATCH = (16, 32, 64), 0.3, 500


class Seen(NamedTuple):
    """What the classifier makes of images: features (N, 64), at least 0, and classes int64 (N,)."""

    features: Tensor
    classes: Tensor


class DigitsClassifier(nn.Module):
    """Three pairs of 3x3 convolutions, each halving the image, then 64 ReLU features and ten classes.

    Input: float32 (N, 1, 28, 28) in [-1, 1], white strokes on black. Output: logits (N, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        before = SHAPE[0]
        for width in _WIDTHS:
            for channels in (before, width):
                blocks += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            blocks.append(nn.MaxPool2d(2))
            before = width
        self.blocks = nn.Sequential(*blocks, nn.Flatten())
        self.hidden = nn.Linear(before * 3 * 3, FEATURES)
        self.logits = nn.Linear(FEATURES, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer after its ReLU: (N, 64)."""
        return functional.relu(self.hidden(self.blocks(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(functional.dropout(self.features(x), _DROPOUT, self.training))

    @torch.no_grad()
    def look(self, images: Tensor) -> Seen:
        """Features and classes of images (N, 1, 28, 28) in [-1, 1], in batches of 500; call it in eval mode."""
        features = torch.cat([self.features(batch) for batch in images.split(_BATCH)])
        return Seen(features, self.logits(features).argmax(1))


def digits_classifier() -> DigitsClassifier:
    """The bundled classifier, on the CPU and in eval mode; `fastsample.evaluate.training` is how it was trained.

    Raises:
        FileNotFoundError: the weights are not installed.
    """
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"the bundled classifier is missing: {WEIGHTS} (reinstall fastsample)")
    # Initial weights, soon overwritten, should not advance the caller's generator.
    with torch.random.fork_rng(devices=[]):
        model = DigitsClassifier()
    model.load_state_dict(safetensors.torch.load_file(WEIGHTS))
    return model.eval()
