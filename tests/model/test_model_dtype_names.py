"""Which layers embed the time, told by their names, and models whose dtype cannot be asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample import Schedule, ddim
from fastsample.model.placement import placement

OF_TIME = [
    "time",
    "time_mlp",
    "time_embed",
    "time_embedding",
    "timestep_embedder",
    "timesteps_embedding",
    "t_embedder",
    "t_emb",
    "temb",
    "temb_proj",
    "emb_time",
    "time_text_embed",
    "TimeEmbedding",
    "time2",
]
OTHERS = ["silu", "timeless", "runtime", "sometimes", "text_embedder", "context_emb", "patent", "item_b", "attempt"]


def net(**linears: tuple[int, torch.dtype]) -> nn.Module:
    """Linears of these widths and dtypes, each the only layer of a part of this name."""
    return nn.ModuleDict(
        {name: nn.ModuleDict({"0": nn.Linear(n, n).to(dtype)}) for name, (n, dtype) in linears.items()}
    )


@pytest.mark.parametrize("name", OF_TIME)
def test_the_embedding_of_time_is_left_aside(name: str) -> None:
    assert placement([net(**{name: (32, torch.float32), "body": (4, torch.bfloat16)})])[0] == torch.bfloat16


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_names_count(name: str) -> None:
    assert placement([net(**{name: (32, torch.float32), "body": (4, torch.bfloat16)})])[0] == torch.float32


@pytest.mark.parametrize("error", [KeyError, ValueError, AssertionError, IndexError, StopIteration, TypeError])
def test_a_dtype_that_cannot_be_asked_for(error: type[Exception]) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 3).to(torch.bfloat16)

        @property
        def dtype(self) -> Any:
            raise error

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.body(x)

    sample = ddim(Failing().eval(), (2, 3), steps=2, schedule=Schedule.linear(), seed=0)
    assert sample.shape == (2, 3)
