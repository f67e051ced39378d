"""to_uint8: every rounding, clamping, layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsample import ops, to_uint8

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_to_the_nearest(dtype: torch.dtype) -> None:
    x = torch.linspace(-1.3, 1.3, 6 * 5000, dtype=torch.float64).to(dtype).reshape(2, 3, 50, 100)
    got = to_uint8(x)
    assert got.dtype == torch.uint8 and got.shape == (2, 50, 100, 3) and got.is_contiguous()
    levels = np.clip((x.double().permute(0, 2, 3, 1).numpy() + 1) * 127.5, 0, 255)
    # Two roundings in float32 of numbers up to 256: 2^-17 and 2^-17.
    assert np.abs(got.numpy() - levels).max() <= 0.5 + 2.0**-16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_byte_comes_back(dtype: torch.dtype) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(pixels.to(dtype) / 127.5 - 1), pixels.permute(0, 2, 3, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_picture(dtype: torch.dtype) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 6e4, -6e4, 0.0], dtype=dtype)
    assert to_uint8(x.reshape(1, 1, 2, 3)).flatten().tolist() == [0, 255, 0, 255, 0, 128]


@pytest.mark.parametrize("layout", ["channels-last", "expanded", "negated"])
def test_strides(layout: str) -> None:
    x = ops.randn((2, 3, 4, 5), seed=0)
    before = x.clone()
    strided = {
        "channels-last": x.to(memory_format=torch.channels_last),
        "expanded": x[:, :1].expand(2, 3, 4, 5),
        "negated": torch.complex(torch.zeros_like(x), x).conj().imag,
    }[layout]
    assert torch.equal(to_uint8(strided), to_uint8(strided.clone(memory_format=torch.contiguous_format)))
    assert torch.equal(x, before)


def test_needs_no_gradients() -> None:
    assert not to_uint8(torch.zeros(1, 3, 2, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("x", "error"),
    [
        pytest.param(torch.zeros(3, 4, 4), ValueError, id="no-batch"),
        pytest.param(torch.zeros(1, 3, 4, 4, 4), ValueError, id="video"),
        pytest.param(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, id="bytes"),
        pytest.param(np.zeros((1, 3, 4, 4)), TypeError, id="numpy"),
    ],
)
def test_refuses(x: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="x must be"):
        to_uint8(x)  # type: ignore[arg-type]
