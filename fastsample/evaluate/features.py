"""What images are compared by: the bundled classifier's hidden layer, coarse pixels, or a function of one's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastsample.evaluate.classifier import SHAPE, DigitsClassifier, digits_classifier
from fastsample.evaluate.sources import Reference
from fastsample.train.data import ImageData

Features = Callable[[Tensor], Tensor]
NAMES = ("classifier", "inception", "pixels")
_COARSE = 8


def name_of(features: str | Features | None, reference: Reference) -> str:
    """What features are called; by default the classifier's for mnist5k, the only images that it was made for.

    Raises:
        ValueError: for an unknown name, for none with a reference of one's own, and for the classifier with images
            that it cannot take.
    """
    if callable(features):
        return getattr(features, "__name__", type(features).__name__)
    if features is None:
        if not reference.digits:
            raise ValueError(
                f"features must be named for the reference {reference.name}: 'pixels' suits any images; 'classifier' "
                "was trained on handwritten digits and is only for their like"
            )
        return "classifier"
    if features not in NAMES:
        raise ValueError(f"features must be one of {', '.join(NAMES)}, or a function; got {features!r}")
    if features == "classifier" and tuple(reference.data.images.shape[1:]) != SHAPE:
        shape = tuple(reference.data.images.shape[1:])
        raise ValueError(
            f"features 'classifier' are for images of shape {SHAPE}, the reference has {shape}: take 'pixels'"
        )
    return features


class Eye:
    """Sees images: their features as float64 (N, D), and their classes where it knows any.

    Args:
        features: as in evaluate, already checked.
    """

    def __init__(self, features: str | Features) -> None:
        self._classifier: DigitsClassifier | None = digits_classifier() if features == "classifier" else None
        own = {"pixels": lambda: coarse_pixels, "inception": inception}.get(str(features))
        self._function = features if own is None else own()

    def see(self, data: ImageData) -> tuple[Tensor, Tensor | None]:
        """(features, classes or None) of all images.

        Raises:
            ValueError: where a function of the caller's does not return finite (N, D).
        """
        images = data.scaled(torch.arange(len(data.images)))
        if self._classifier is not None:
            seen = self._classifier.look(images)
            return seen.features.double(), seen.classes
        assert callable(self._function)
        with torch.no_grad():
            found = self._function(images)
        if found.ndim != 2 or len(found) != len(images) or not found.isfinite().all():
            raise ValueError(f"features must be finite (N, D) for N = {len(images)} images, got {tuple(found.shape)}")
        return found.double(), None


def inception() -> Features:
    """torchmetrics' Inception V3 with the weights of torch-fidelity, as FID is commonly taken: (N, 2048).

    Raises:
        ImportError: torch-fidelity is missing.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        network = FrechetInceptionDistance(feature=2048).inception
    except ImportError as error:
        raise ImportError("features 'inception' need torch-fidelity: pip install torch-fidelity") from error

    def see(images: Tensor) -> Tensor:
        levels = ((images + 1) * 127.5).round().to(torch.uint8)
        found: Tensor = network(levels if levels.shape[1] == 3 else levels[:, :1].expand(-1, 3, -1, -1))
        return found

    return see


def coarse_pixels(images: Tensor) -> Tensor:
    """Images (N, C, H, W), averaged down to 8 x 8: (N, 64 C). They tell brightness and layout, not what is shown."""
    return functional.adaptive_avg_pool2d(images, _COARSE).flatten(1)
