"""ops/checks.py: what an op makes of its arguments."""

from __future__ import annotations

import pytest
import torch

from fastsample.ops.checks import guidance_weights

X = torch.zeros(2, 3, 5, 7)


@pytest.mark.parametrize("guidance", [7.5, 2, -1.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_guidance_that_is_a_number_is_that_of_every_sample(guidance: float, dtype: torch.dtype) -> None:
    weights = guidance_weights(guidance, X.to(dtype))
    assert weights.dtype == dtype and torch.equal(weights, torch.tensor([guidance, guidance], dtype=dtype))


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), -float("inf")])
def test_a_guidance_that_is_not_finite_is_refused(guidance: float) -> None:
    with pytest.raises(ValueError, match="guidance must be finite"):
        guidance_weights(guidance, X)
