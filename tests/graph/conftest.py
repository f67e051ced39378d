"""The tests of graphs run on the pretended device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.cuda_graphs import cuda_graphs
from support.pretend_device import Device


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with cuda_graphs(monkeypatch) as device:
        yield device
