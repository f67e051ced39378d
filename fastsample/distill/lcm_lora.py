"""Latent consistency distillation into a LoRA alone (Luo et al. 2023, "LCM-LoRA"), by the method of distill/lcm.py.

The teacher's weights stay as they are, so that the LoRA also speeds up other models of its kind, such as the same one
with the LoRA of a style: fastsample.lora.set_adapters(model, {"lcm": 1.0, "style": 0.8}).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from typing_extensions import Unpack

from fastsample.distill.common import Common
from fastsample.distill.data import Data, Samples
from fastsample.distill.lcm import distilled
from fastsample.distill.lcm_student import LCMStudent
from fastsample.distill.settings import Settings
from fastsample.lora.trainable import Trainable, check_fit
from fastsample.model import Model
from fastsample.zoo.plain import plain
from fastsample.zoo.unet import UNet


def lcm_lora(
    teacher: Model,
    data: Data,
    out: str | Path,
    *,
    rank: int = 8,
    targets: Sequence[str] | None = None,
    scales: int = 50,
    loss: str = "huber",
    target_decay: float = 0.0,
    **common: Unpack[Common],
) -> LCMStudent:
    """Distils a guided model into a LoRA, with which fastsample.lcm samples the model in a few steps.

    Args:
        teacher: a torch module, as samplers take it.
        data: see distill.lcm.
        out: the folder of the run: student.safetensors, checkpoint.pt, loss.csv, loss.png. The student's file holds the
            LoRA alone, as fastsample.lora.attach and diffusers' load_lora_weights read it.
        rank, targets: see lora.Trainable. Stable Diffusion's LCM-LoRAs have rank 64; small models need 8.
        scales, loss, target_decay: see distill.lcm.
        **common: see distill.Common. Guidance is one weight: a LoRA has no input that could be told another.

    Returns:
        The student, whose network is a lora.Trainable of the teacher; see distill.lcm.

    Raises:
        ValueError, TypeError: arguments that cannot work, or a folder of another run, before anything is computed.
        ArithmeticError: the loss, its gradient or a weight is not finite; the last checkpoint is from before that.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from fastsample import Schedule, lora, zoo
        >>> teacher = zoo.UNet(zoo.UNetConfig(widths=(8, 16)), Schedule.cosine(100)).eval()
        >>> short = {"settings": Settings(iterations=1, batch_size=2), "progress": False}
        >>> with TemporaryDirectory() as out:
        ...     student = lcm_lora(teacher, torch.zeros(5, 1, 28, 28), out, rank=2, scales=4, **short)
        ...     report = lora.attach(teacher, Path(out, "student.safetensors"), name="lcm")
        >>> student.sample((3, 1, 28, 28), steps=4, seed=0).shape, len(report.matched)
        (torch.Size([3, 1, 28, 28]), 17)
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch module, whose layers get the LoRA; got {type(teacher).__name__}")
    if common.get("student") is not None:
        raise ValueError("lcm_lora trains adapters of the teacher: leave student= out")
    if common.get("output") is not None:
        raise ValueError("a LoRA changes no prediction into another: leave output= out")
    if isinstance(common.get("guidance"), tuple | list):
        raise ValueError("guidance must be one number: a LoRA has no input that could be told another")
    base = plain(teacher) if isinstance(teacher, UNet) else teacher
    seed = (common.get("settings") or Settings()).seed
    adapted = Trainable(base, rank, targets=targets, seed=seed)
    check_fit(adapted, teacher)
    common["student"] = adapted
    return distilled("lcm_lora", teacher, Samples(data, common), out, scales, loss, target_decay, None)
