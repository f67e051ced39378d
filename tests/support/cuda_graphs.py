"""torch.cuda's graphs on the pretended device: a capture tapes what it launches, a replay runs the tape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import DDIM
from support.pretend_device import Device, pretended
from support.whole_runs import SCHEDULE

NOISY = DDIM(SCHEDULE, steps=3, eta=1.0)


@contextmanager
def cuda_graphs(monkeypatch: pytest.MonkeyPatch, kernels: bool = True) -> Iterator[Device]:
    """The pretended device, with torch.cuda's graphs and streams as it can have them."""

    class Taped:
        def __init__(self) -> None:
            self.tape: list[Callable[[], None]] = []

        def replay(self) -> None:
            with torch.inference_mode():  # what was made in it may be written in it alone
                for one in self.tape:
                    one()

    with pretended(monkeypatch, kernels) as device:

        @contextmanager
        def capture(taped: Taped, stream: object, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            device.tape = taped.tape
            try:
                with device.refusing():
                    yield
            finally:
                device.tape = None

        stream = SimpleNamespace(wait_stream=lambda other: None)
        replaced = {
            "CUDAGraph": Taped,
            "graph": capture,
            "Stream": lambda where: stream,
            "stream": nullcontext,
            "current_stream": lambda: stream,
            "device": nullcontext,
        }
        for name, stand_in in replaced.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        yield device


def host(tensor: Any) -> Tensor:
    assert tensor.device.type == "cuda"
    return tensor.host
