"""What `fastsample demo` draws: digits by the bundled model in many steps, and by its students in few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsample.samplers import ddim, dpm_solver
from fastsample.zoo import UNet, digits

SHAPE = (10, 1, 28, 28)
GUIDANCE = 1.25  # which the students have folded in, or are told
MANY = 50
STUDENTS = (
    ("progressive-4", 4),
    ("guided-4", 4),
    ("lcm", 4),
    ("lcm-lora", 4),
    ("trajectory-4", 2),
    ("trajectory-4", 1),
    ("consistency", 1),
)
NO_LABEL = 10  # the class that stands for any digit


@dataclass(frozen=True)
class Row:
    """A line of the picture: a model with a sampler, in so many steps.

    Attributes:
        name, steps: what it is called.
        key: its name among the figures of zoo.measured.
        draw: makes the digits 0 to 9 of a seed.
    """

    name: str
    steps: int
    key: str
    draw: Callable[[int], Tensor]


def rows_of(model: UNet, y: Tensor) -> list[Row]:
    """The teacher under guidance, in many steps and in as few as its students."""

    def teacher(name: str, sampler: Callable[..., Any], steps: int) -> Row:
        def draw(seed: int) -> Tensor:
            images: Tensor = sampler(model, SHAPE, steps=steps, seed=seed, clip=1.0, **guided(y))
            return images

        return Row(f"teacher, {name}", steps, f"{name}, {steps}, guidance {GUIDANCE:g}", draw)

    def student(name: str, steps: int) -> Row:
        distilled = digits(name)
        told = {"guidance": GUIDANCE} if "guidance" in distilled.facts.told else {}
        key = f"{name}, {steps}, guidance {GUIDANCE:g}" if told else f"{name}, {steps}"

        def draw(seed: int) -> Tensor:
            images: Tensor = distilled.sample(SHAPE, steps, seed=seed, y=y, **told)
            return images

        of = "student" if distilled.autoencoder is None else "student of latents"
        return Row(f"{of}, {name}", steps, key, draw)

    return [
        teacher("DDIM", ddim, MANY),
        teacher("DPM-Solver++ 2M", dpm_solver, 10),
        teacher("DDIM", ddim, 10),
        teacher("DDIM", ddim, 4),
        *(student(name, steps) for name, steps in STUDENTS),
    ]


def guided(y: Tensor) -> dict[str, Any]:
    """The arguments of `ddim` for digits y under classifier-free guidance."""
    return {"guidance": GUIDANCE, "cond": {"y": y}, "uncond": {"y": torch.full_like(y, NO_LABEL)}}
