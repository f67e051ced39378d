"""A training in one process, or in several that torchrun has started."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fastsample.lora.layers.linear import LoRALinear


class Processes:
    """The processes of a run, and this one's place among them.

    One process needs nothing. Several, as `torchrun` starts them, are brought together by accelerate: gradients are
    averaged over them as `loss.backward()` finds them.

    Args:
        device: where this process computes; with several on GPUs accelerate chooses one for each.

    Raises:
        ImportError: there are several processes, and no accelerate.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device, self.rank, self.count = torch.device(device), 0, 1
        self._accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import Accelerator, DistributedDataParallelKwargs
            except ImportError as error:
                raise ImportError("several processes need accelerate: pip install fastsample[train]") from error
            # What its own settings and variables may say of precision is for Settings to say here.
            unused = DistributedDataParallelKwargs(find_unused_parameters=True)
            self._accelerator = Accelerator(
                cpu=self.device.type == "cpu", mixed_precision="no", kwargs_handlers=[unused]
            )
            self.device = self._accelerator.device
            self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def shared(self, model: nn.Module) -> nn.Module:
        """The model as it is to be called, so that its gradients are those of all processes."""
        if self._accelerator is None:
            return model
        prepared: nn.Module = self._accelerator.prepare_model(model)
        for module in model.modules():
            if isinstance(module, LoRALinear):  # which has packed what the first process has now written over
                module.repack()
        return prepared

    def part(self, whole: Tensor) -> Tensor:
        """This process's share of a batch."""
        return whole.chunk(self.count)[self.rank]

    def wait(self) -> None:
        """Until all processes have come here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        if self._accelerator is None:
            return values
        average: Tensor = self._accelerator.reduce(values, reduction="mean")
        return average


def gathered(*parts: Tensor) -> tuple[Tensor, ...]:
    """The tensors of all processes in their order, each joined to one, everywhere."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return parts
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, parts)
    return tuple(torch.cat([other[i] for other in every]) for i in range(len(parts)))
