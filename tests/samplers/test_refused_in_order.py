"""Which of several errors in one call is told: what a run is made of before where it starts, hooks before names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import DDIM, Schedule

SAMPLER = DDIM(Schedule.linear(), steps=4)
WRONG_STARTS: list[dict[str, Any]] = [{"start_step": 99}, {"strength": 3.0}, {"start_step": 2, "strength": 0.5}]


def model(x: Tensor, t: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("way", ["__call__", "iterate", "prepare"])
@pytest.mark.parametrize("start", WRONG_STARTS, ids=str)
@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((3, (2, 3)), {}, "model must be callable"),
        ((model, (0, 3)), {}, "x must have a first axis"),
        ((model, np.ones((2, 3))), {}, "x must be a shape or a tensor, got ndarray"),
        ((model, torch.ones(2, 3)), {"backend": "nope"}, "(backend|.*nope)"),
        ((model, torch.ones(2, 3)), {"model_dtype": torch.int8}, "model_dtype"),
        ((model, torch.ones(2, 3)), {"guidance": 2.0}, "start_step|strength|give strength="),
    ],
    ids=["model", "shape", "x", "backend", "model_dtype", "start"],
)
def test_the_start_comes_after_what_it_starts(
    way: str, start: dict[str, Any], given: tuple[Any, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^({message})"):
        getattr(SAMPLER, way)(*given, **start, **options)


@pytest.mark.parametrize("way", ["__call__", "prepare"])
@pytest.mark.parametrize("hook", ["callback", "decode"])
def test_hooks_come_before_names(way: str, hook: str) -> None:
    with pytest.raises(TypeError, match=f"^{hook} must be callable, got int"):
        getattr(SAMPLER, way)(model, (2, 3), stepz=3, **{hook: 3})
