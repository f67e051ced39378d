"""Models and noise of published chains: improved-diffusion's golden data and the sums in diffusers' own tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

# improved-diffusion's chains: file, spacing, the seed of its noise.
CHAINS = [
    pytest.param("iddpm_linear1000_ddim50", "ddim50", 1, id="linear1000"),
    pytest.param("iddpm_cosine4000_100", "100", 2, id="cosine4000"),
    pytest.param("iddpm_linear300_10-15-20", "10,15,20", 3, id="linear300"),
]


def toy_model(x: Tensor, t: Tensor) -> Tensor:
    return 0.6 * torch.tanh(x) + 0.2 * torch.sin(0.013 * t.to(x.dtype)).view(-1, *[1] * (x.ndim - 1))


def golden_noise(seed: int, k: int, shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed * 1000 + k).randn(*shape).astype(np.float32))


def diffusers_dummies() -> tuple[Tensor, object]:
    x = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    return x, lambda x, t: x * (t[0] / (t[0] + 1))


def learned_model(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat((toy_model(x, t), torch.cos(1.7 * x)), dim=1)
