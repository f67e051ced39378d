"""Small trained models for trying out samplers, and models distilled from them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, overload

from fastsample.checks import one_of
from fastsample.zoo.autoencoder import Autoencoder, AutoencoderConfig
from fastsample.zoo.autoencoder_store import load_autoencoder, save_autoencoder
from fastsample.zoo.store import load, save
from fastsample.zoo.unet import UNet, UNetConfig

__all__ = [
    "LORAS",
    "STUDENTS",
    "Autoencoder",
    "AutoencoderConfig",
    "UNet",
    "UNetConfig",
    "digits",
    "latent_digits",
    "load",
    "load_autoencoder",
    "measured",
    "save",
    "save_autoencoder",
]

_DIGITS = Path(__file__).with_name("digits.safetensors")
_NAMES = (
    "trajectory-4",
    "trajectory-4-half",
    "progressive-4",
    "progressive-2",
    "progressive-1",
    "consistency",
    "guided-4",
    "guided-4-latent",
    "lcm",
)
LORAS = {name: _DIGITS.with_name(f"digits-{name}-lora.safetensors") for name in ("lcm", "leaning")}
STUDENTS = {name: _DIGITS.with_name(f"digits-{name}.safetensors") for name in _NAMES} | {"lcm-lora": LORAS["lcm"]}
_LATENT, _AUTOENCODER = (_DIGITS.with_name(f"digits-{name}.safetensors") for name in ("latent", "autoencoder"))
FILES = {"digits": _DIGITS, "latent-digits": _LATENT, **STUDENTS}  # of all that commands name zoo:NAME
_FIGURES = _DIGITS.with_name("quality.json")


@overload
def digits() -> UNet: ...


@overload
def digits(student: str) -> Any: ...


def digits(student: str | None = None) -> Any:
    """The bundled model of handwritten digits: 1 x 28 x 28, ten classes, cosine schedule of 1000 timesteps.

    It predicts epsilon and a learned variance; class 10 stands for "any digit". The last timesteps of a cosine schedule
    are next to pure noise. With their default times samplers begin below them and need no clip, but for `ddpm`, which
    begins there; so do the times "trailing", "linspace" and "karras". Give clip=1.0 then, as the warning says. Of these
    times `heun` works with "karras" alone.

    Args:
        student: one of zoo.STUDENTS, a model of few steps that was distilled from it: a distill.Student, whose
            `sample` draws digits. "trajectory-4" and "consistency" are for 4, 2 or 1 steps, "trajectory-4-half" is of
            half the width, and "progressive-4" and so on are for as many; "lcm-lora" is a LoRA (zoo.LORAS) on the
            model. These have guidance 1.25 folded in. "guided-4" and "lcm" are told guidance from 1 to 8. "lcm" and
            "guided-4-latent" are students of `latent_digits`.

    Raises:
        FileNotFoundError: the weights are not installed. ValueError: there is no such student.

    Example:
        >>> digits("trajectory-4").sample((2, 1, 28, 28), seed=0, y=torch.tensor([3, 7])).shape
        torch.Size([2, 1, 28, 28])
    """
    path = _DIGITS if student is None else STUDENTS[one_of("student", student, tuple(STUDENTS))]
    if not path.is_file():
        raise FileNotFoundError(f"the bundled digits model is missing: {path} (reinstall fastsample)")
    if student is None:
        return load(path)
    # Students know their samplers, which stand above the models here.
    distilled = importlib.import_module("fastsample.distill").load(
        path, load(_DIGITS) if student == "lcm-lora" else None
    )
    if student in ("lcm", "guided-4-latent"):
        distilled.decode_with(load_autoencoder(_AUTOENCODER))
    return distilled


def latent_digits() -> tuple[UNet, Autoencoder]:
    """A bundled model of latents of handwritten digits, 4 x 7 x 7, and the autoencoder that they are of.

    Its classes, schedule and prediction are those of `digits`. Latents have no bounds: samplers need no clip.

    Raises:
        FileNotFoundError: the weights are not installed.

    Example:
        >>> import fastsample
        >>> model, autoencoder = latent_digits()
        >>> y = torch.arange(10)
        >>> digits = fastsample.ddim(
        ...     model, (10, 4, 7, 7), steps=20, seed=0, model_kwargs={"y": y}, decode=autoencoder.decode
        ... )
        >>> digits.shape
        torch.Size([10, 1, 28, 28])
    """
    for path in (_LATENT, _AUTOENCODER):
        if not path.is_file():
            raise FileNotFoundError(f"the bundled model of latents is missing: {path} (reinstall fastsample)")
    return load(_LATENT), load_autoencoder(_AUTOENCODER)


def measured() -> dict[str, float]:
    """Frechet distances of 5,000 samples by name, which `python -m benchmarks.quality --students --write` has found.

    "DDIM, 50, guidance 1.25" is the digits model in 50 steps of DDIM, "trajectory-4, 4" a student in four.
    """
    figures: dict[str, float] = json.loads(_FIGURES.read_text()) if _FIGURES.is_file() else {}
    return figures
