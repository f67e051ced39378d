"""Ctrl-C while a step reads the model's output: it is not taken for an output that has no such attribute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastsample import DDIM, Schedule
from fastsample.ops.backend import cpu_module
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan

pytestmark = pytest.mark.skipif(cpu_module() is None, reason="the short cut is the kernel's")

TABLE = DDIM(Schedule.linear(), steps=2).table
READ = ["is_cpu", "dtype", "shape", "is_contiguous", "is_neg", "data_ptr"]


class Raises(TorchFunctionMode):
    """Raises this error where an attribute of a tensor is asked for."""

    def __init__(self, name: str, error: type[BaseException]) -> None:
        super().__init__()
        self.name, self.error = name, error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (getattr(Tensor, self.name), getattr(getattr(Tensor, self.name), "__get__", None)):
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError, TypeError, NotImplementedError])
def test_only_what_an_output_lacks_is_passed_over(name: str, error: type[BaseException]) -> None:
    x = torch.ones(1, 3)
    plain = StepPlan(Operands(x, TABLE, out=x)).plain[0]
    assert plain is not None
    m = torch.zeros(1, 3)
    with Raises(name, error):
        if issubclass(error, RuntimeError | TypeError):
            assert plain(m, False, False, 1) is False
        else:
            with pytest.raises(error):
                plain(m, False, False, 1)
    assert torch.equal(x, torch.ones(1, 3)), "nothing was written"
    assert plain(m, False, False, 1)
