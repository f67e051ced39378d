"""What the Batcher's tests sample, and the same samples from the sampler's own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsample import (
    Sampler,
    Schedule,
    Table,
)

SHAPE = (2, 5, 3)


SCHEDULE = Schedule.linear()


def exact(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
    """Sums, products and clamps alone, which round alike wherever an element lies."""
    along = (-1, *(1,) * (x.ndim - 1))
    m = (x * 0.5).clamp(-1, 1) + (t * 0.0003).to(x.dtype).reshape(along)
    return m if c is None else m * c.to(x.dtype).reshape(along)


def with_variance(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
    return torch.cat([exact(x, t, c), (x * 0.25).clamp(-1, 1)], dim=1)


class HandMade(Sampler):
    def __init__(self, table: Table, correct_x0: Any = None) -> None:
        self.table, self.correct_x0 = table, correct_x0


# Three entries of history that are not x0 itself, noise that depends on the row, a scaled input and fractional times,
# all at once.
EVERYTHING = HandMade(
    Table(
        [9.5, 7.25, 3.0, 2.5, 0.125],
        p=1.1,
        q=-0.5,
        a=0.3,
        b=0.4,
        c1=[0, 0.2, -0.1, 0.3, 0.1],
        c2=[0, 0, 0.2, -0.2, 0.1],
        c3=[0, 0, 0, 0.15, -0.1],
        d=0.1,
        s=[0.5, 0.4, 0.3, 0.2, 0.1],
        g0=-0.5,
        g1=[0.5, 0, 0.25, 0.5, 0.1],
        limit=[1.5, 1.0, 2.0, 3.0, 1.0],
        hx=[0.4, 0.3, 0.2, 0.1, 0.0],
        h0=[-0.5, 0.6, -0.7, 0.8, 1.0],
        e=[0.5, 0.6, 0.7, 0.8, 0.9],
        init_noise_sigma=3.0,
    )
)


def plain(sampler: Sampler, model: Callable[..., Tensor], seed: int, c: float | None = None, **options: Any) -> Tensor:
    """The same sample from the sampler's own loop, in a batch of one."""
    keywords = {} if c is None else {"c": torch.tensor([c])}
    result: Tensor = sampler(model, (1, *SHAPE), seed=seed, model_kwargs=keywords, **options)[0]
    return result
