"""ops.bend: guidance by other methods than the plain one, on every backend against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample.ops.bend import Bend, Settings, bend_reference
from support.devices import Target
from support.formula import normal
from support.levels import LEVELS, at_level, needs_cpu, on_threads

SETTINGS = {
    "zero-star": Settings("cfg_zero_star"),
    "zero-star-rescaled": Settings("cfg_zero_star", rescale=0.7),
    "apg": Settings("apg"),
    "apg-limited": Settings("apg", eta=0.5, norm_threshold=2.5),
    "apg-rescaled": Settings("apg", rescale=0.3, norm_threshold=5.0),
    "apg-with-momentum": Settings("apg", norm_threshold=5.0, momentum=-0.5),
    "apg-with-momentum-rescaled": Settings("apg", rescale=0.3, eta=0.2, norm_threshold=5.0, momentum=0.4),
}
# A block or chunk of a sample and several, whole and not.
SHAPES = [(1, 1), (2, 3), (3, 5, 7), (2, 3, 33, 31), (2, 1, 2048), (1, 2, 2051)]
OUTPUTS = [
    *((name, torch.float32) for name in SETTINGS),
    *(("apg-with-momentum-rescaled", dtype) for dtype in (torch.float16, torch.bfloat16)),
]
# `cuda` has no kernel of its own.
EVERY_BACKEND = pytest.mark.parametrize("any_backend", ["reference", "cpu", "triton"], indirect=True)


def outputs(shape: tuple[int, ...], dtype: torch.dtype, *, learned: bool = False, rows: int = 3) -> list[Tensor]:
    """Both halves in several rows of a run, as near to each other as those of a model."""
    channels = 2 * shape[1] if learned else shape[1]
    made = []
    for row in range(rows):
        conditional = normal((shape[0], channels, *shape[2:]), row) + 0.3
        unconditional = conditional + 0.2 * normal(conditional.shape, 10 + row)
        made.append(torch.cat([unconditional, conditional]).to(dtype))
    return made


def in_float64(rows: list[Tensor], channels: int, weights: Tensor, settings: Settings) -> list[Tensor]:
    found, moved = [], None
    for output in rows:
        m, moved = bend_reference(output.double(), channels, weights.double(), settings, moved)
        found.append(m)
    return found


@EVERY_BACKEND
@pytest.mark.parametrize(("name", "dtype"), OUTPUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(any_backend: Target, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weights = torch.linspace(1.0, 7.5, shape[0])
    bend = Bend(SETTINGS[name], weights.to(any_backend.device), any_backend.backend)
    rows = outputs(shape, dtype, learned=len(shape) > 2)
    want = in_float64(rows, shape[1], weights, SETTINGS[name])
    for _ in range(2):  # a second run begins anew
        bend.begin()
        for output, one in zip(rows, want, strict=True):
            got = bend(output.to(any_backend.device), shape[1]).cpu()
            # A share is rounded once, each product and sum once; the reference in float32 has some more.
            assert (got.double() - one).abs().max() <= 4e-6 * one.abs().max()


@EVERY_BACKEND
@pytest.mark.parametrize("name", SETTINGS)
def test_weight_1_is_the_conditional_half_alone(any_backend: Target, name: str) -> None:
    (output,) = outputs((2, 3, 5), torch.float32, rows=1)
    conditional, given = output[2:].clone(), output.clone()
    given[0] = math.nan  # the unconditional half of the first sample
    bend = Bend(SETTINGS[name], torch.tensor([1.0, 4.0], device=any_backend.device), any_backend.backend)
    got = bend(given.to(any_backend.device), 3).cpu()
    assert torch.equal(got[0], conditional[0]) and got[1].isfinite().all()


@EVERY_BACKEND
@pytest.mark.parametrize("name", SETTINGS)
def test_constant_and_empty_halves(any_backend: Target, name: str) -> None:
    """Nothing is divided by 0: the halves of the first sample are constant, those of the others are 0 in part."""
    (output,) = outputs((4, 3, 5), torch.float32, rows=1)
    output[[0, 4]] = torch.tensor([0.5, 0.7]).reshape(2, 1, 1)
    output[1], output[6], output[[3, 7]] = 0.0, 0.0, 0.0
    weights = torch.full((4,), 4.0)
    bend = Bend(SETTINGS[name], weights.to(any_backend.device), any_backend.backend)
    (want,) = in_float64([output], 3, weights, SETTINGS[name])
    got = bend(output.to(any_backend.device), 3).cpu()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["zero-star", "apg-with-momentum"])
def test_nan_stays_in_its_sample(any_backend: Target, name: str) -> None:
    (output,) = outputs((2, 3, 5), torch.float32, rows=1)
    output[2, 1, 1] = math.nan
    bend = Bend(SETTINGS[name], torch.full((2,), 4.0, device=any_backend.device), any_backend.backend)
    got = bend(output.to(any_backend.device), 3).cpu()
    assert got[0].isnan().all() and got[1].isfinite().all()


@needs_cpu
@pytest.mark.parametrize("name", ["zero-star-rescaled", "apg-with-momentum-rescaled"])
def test_same_bits_on_every_level_and_thread_count_and_in_any_batch(name: str) -> None:
    rows, weights = outputs((5, 1, 4099), torch.bfloat16), torch.linspace(1.5, 7.5, 5)
    results = set()
    for level in LEVELS:
        for threads in (1, 3):
            with at_level(level), on_threads(threads):
                together, alone = Bend(SETTINGS[name], weights, "cpu"), Bend(SETTINGS[name], weights[3:4], "cpu")
                for output in rows:
                    got, one = together(output, 1).clone(), alone(output[[3, 8]], 1)
                    assert torch.equal(got[3:4], one)
            results.add(got.numpy().tobytes())
    assert len(results) == 1


@EVERY_BACKEND
def test_model_outputs_of_any_strides_and_dtypes(any_backend: Target) -> None:
    (output,) = outputs((2, 3, 4, 6), torch.float32, rows=1)
    weights = torch.full((2,), 4.0)
    (want,) = in_float64([output], 3, weights, SETTINGS["apg"])
    for given in (output.to(memory_format=torch.channels_last), output.double(), output[..., ::2].contiguous()):
        bend = Bend(SETTINGS["apg"], weights.to(any_backend.device), any_backend.backend)
        (want,) = in_float64([given], 3, weights, SETTINGS["apg"])
        got = bend(given.to(any_backend.device), 3).cpu()
        assert (got.double() - want).abs().max() <= 4e-6 * want.abs().max()


@EVERY_BACKEND
def test_the_models_output_is_left_alone(any_backend: Target) -> None:
    (output,) = outputs((2, 3, 5), torch.float32, rows=1)
    given = output.to(any_backend.device)
    arguments: dict[str, Any] = {"weights": torch.full((2,), 4.0, device=any_backend.device)}
    Bend(SETTINGS["apg-with-momentum"], **arguments, backend=any_backend.backend)(given, 3)
    assert torch.equal(given.cpu(), output)
