"""Noise that the caller brings: a function of the row, or torch's own generators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from fastsample.hints import check_takes
from fastsample.loop.options import Noise
from fastsample.ops.memory import ordinary_tensors


def noise_source(noise: Noise, state: Tensor) -> Callable[[int], Tensor]:
    """noise(k) for row k: the caller's own function, or torch's stream from one generator or one per sample."""
    if callable(noise) and not isinstance(noise, Generator):
        check_takes("noise", noise, "noise(row)", "the row, 0 being the noisiest")
        return noise
    generators = [noise] if isinstance(noise, Generator) else list(noise) if isinstance(noise, Sequence) else []
    if not generators or not all(isinstance(one, Generator) for one in generators):
        raise TypeError("noise must be a function of the row, a torch.Generator or a list of them; x_T goes in as x")
    if not isinstance(noise, Generator) and len(generators) != state.shape[0]:
        raise ValueError(f"noise must be one generator or {state.shape[0]}, one per sample; got {len(generators)}")
    with ordinary_tensors():
        buffer = torch.empty_like(state, device=generators[0].device)
    parts = [buffer] if isinstance(noise, Generator) else list(buffer.split(1))

    def draw(k: int) -> Tensor:
        for part, generator in zip(parts, generators, strict=True):
            part.normal_(generator=generator)
        return buffer.to(state.device)

    return draw
