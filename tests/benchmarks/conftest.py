"""Smoke runs of the benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.common.optional import optional
from support.levels import on_threads


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSAMPLE_BACKEND", raising=False)


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[list[str]]:
    """Flags of a smoke run. On one thread: a busy machine makes two wait for each other."""
    with on_threads(1):
        yield ["--quick", "--threads", "1", "--out", str(tmp_path)]


@pytest.fixture(params=["with diffusers", "without diffusers"])
def has_diffusers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    yield from _with_or_without("diffusers", request, monkeypatch)


@pytest.fixture(params=["with", "without"])
def has_peft(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    yield from _with_or_without("peft", request, monkeypatch)


def _with_or_without(package: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    there = not request.param.startswith("without")
    if there:
        pytest.importorskip(package)
    else:
        monkeypatch.setitem(sys.modules, package, None)
    optional.cache_clear()
    yield there
    optional.cache_clear()
