"""kernels/lora/tiles.py: which tiles lora_linear's Triton kernels take, and when one launch does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastsample

TRITON = fastsample.backends()["triton"]
pytestmark = [
    pytest.mark.skipif(not TRITON["available"], reason=TRITON["reason"]),
]


HALVES_AND_FLOAT = [torch.float32, torch.float16]


RULE: list[tuple[str, dict[str, Any], bool]] = [
    ("a text encoder's 77 tokens", {"rows": 77, "k": 768, "ns": (320, 320), "width": 16}, True),
    ("q, k and v of 32 x 32", {"rows": 1024, "k": 640, "ns": (640,) * 3, "width": 16}, True),
    ("q, k and v of 64 x 64, twice", {"rows": 4096, "samples": 2, "k": 640, "ns": (640,) * 3, "width": 16}, False),
    ("rank 128", {"rows": 1, "k": 320, "ns": (320,), "width": 128}, False),
    ("rank 64 in float32", {"rows": 1, "k": 320, "ns": (320,), "width": 64, "dtype": torch.float32}, False),
    ("rank 64", {"rows": 1, "k": 320, "ns": (320,), "width": 64}, True),
    ("q, k and v in float32", {"rows": 1024, "k": 640, "ns": (640,) * 3, "width": 16, "dtype": torch.float32}, False),
]


def a_problem(**values: Any) -> Any:
    from fastsample.kernels.lora.tiles import Problem as Shape

    width = values.get("width", 16)
    some = {"rows": 64, "samples": 1, "k": 64, "ns": (64,), "width": width, "columns": 3 * width}
    return Shape(**{**some, "dtype": torch.float16, "device": torch.device("cuda:0"), **values})


@pytest.mark.parametrize(("values", "alone"), [pytest.param(*one[1:], id=one[0]) for one in RULE])
def test_the_rule_for_one_launch(values: dict[str, Any], alone: bool) -> None:
    from fastsample.kernels.lora import tiles

    assert tiles.one_launch(a_problem(**values)) is alone


@pytest.mark.parametrize("limit", [64, 99, 163, 227])
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_tiles_fit_the_shared_memory(dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block, in KB: gfx942, sm_86 and sm_120, sm_80, sm_90 and sm_100. There is always one."""
    from fastsample.kernels.lora import tiles

    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "_shared_memory_of", lambda device: limit << 10)
    most = 0
    for rows, width, alone in itertools.product((1, 64), (0, 16, 64), (True, False)):
        shape = a_problem(rows=rows, width=width, dtype=dtype)
        found = tiles.expand_blocks(shape, alone)
        extra = width if alone else 0
        assert all(tiles.shared_memory(one, extra, dtype.itemsize) <= limit << 10 for one in found)
        assert all(one.columns <= 64 for one in tiles.shrink_blocks(shape._replace(columns=max(width, 16))))
        most = max(most, *(one.rows * one.columns for one in found))
    largest = {torch.float16: {64: 64 * 64, 99: 128 * 128}.get(limit, 128 * 256), torch.float32: 128 * 128}
    assert most == largest[dtype]


def timed(times: dict[Any, float]) -> tuple[list[Any], Callable[..., float]]:
    asked: list[Any] = []

    def milliseconds(run: Any, blocks: Any) -> float:
        asked.append(blocks)
        if blocks not in times:
            raise RuntimeError(f"{blocks} do not compile")
        return times[blocks]

    return asked, milliseconds


def test_the_fastest_tile_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsample.kernels.lora import tiles

    blocks = tiles.FEW["half"][:3]
    asked, milliseconds = timed(dict(zip(blocks[1:], (2.0, 1.0), strict=True)))
    monkeypatch.setattr(tiles, "_best", {})
    monkeypatch.setattr(tiles, "_milliseconds", milliseconds)

    def found(rows: int, capturing: bool = False) -> Any:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        return tiles.fastest("expand", a_problem(rows=rows), blocks, lambda one: None)

    assert found(100, capturing=True) is blocks[0] and not asked
    assert found(100) is blocks[2] and asked == list(blocks)
    assert found(128, capturing=True) is blocks[2] and found(70) is blocks[2] and len(asked) == 3
    assert found(129) is blocks[2] and len(asked) == 6

    # Float32 is timed again where its products are rounded to tf32.
    def found_in(precision: str) -> Any:
        monkeypatch.setattr(tiles, "precision", lambda dtype, device: precision)
        return tiles.fastest("expand", a_problem(dtype=torch.float32), blocks, lambda one: None)

    assert found_in("ieee") is found_in("tf32") is found_in("ieee") is blocks[2] and len(asked) == 12


def test_an_error_of_every_tile_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsample.kernels.lora import tiles

    blocks = tiles.FEW["half"][:3]
    asked, milliseconds = timed({})
    monkeypatch.setattr(tiles, "_best", {})
    monkeypatch.setattr(tiles, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError, match=r"rows=16, columns=32, depth=64.* do not compile"):
        tiles.fastest("expand", a_problem(), blocks, lambda one: None)
    assert asked == list(blocks) and not tiles._best
