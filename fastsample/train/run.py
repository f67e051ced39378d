"""The weights of a training run, their optimizer and average: how a step moves them, and what a checkpoint holds."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastsample.train.checkpoint import CHECKPOINT, State, write_checkpoint
from fastsample.train.processes import Processes


class Run:
    """The state of a run. A step is one or more calls of `accumulate`, whose gradients add up, and one of `descend`.

    Subclasses say what is trained on what.

    Args:
        model: its parameters that require gradients are trained.
        processes: those of the run.
        lr, weight_decay: of AdamW.
        ema_decay: of the averaged weights; 0 keeps the weights themselves, without a copy.

    Attributes:
        average: a module like model with the averaged weights.
        called: the model as it is to be called in training.
        history: what `accumulate` was given in every step so far, means over all processes.
        reported: the names of what that is, the loss first.
    """

    reported: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(
        self, model: nn.Module, processes: Processes, *, lr: float, weight_decay: float, ema_decay: float
    ) -> None:
        self.model, self.processes, self.device = model, processes, processes.device
        self.called = processes.shared(model)
        self.average = copy.deepcopy(model).requires_grad_(False) if ema_decay else model
        self.lr, self.weight_decay, self.ema_decay = lr, weight_decay, ema_decay
        self.optimizer = self.new_optimizer()
        self.history: list[tuple[float, ...]] = []
        self._sums = torch.zeros(len(self.reported))

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def new_optimizer(self) -> torch.optim.Optimizer:
        """One that has no memory yet."""
        return torch.optim.AdamW(self.trained(), lr=self.lr, weight_decay=self.weight_decay, fused=True)

    def accumulate(self, i: int, loss: Tensor, *others: Tensor, of: int = 1) -> None:
        """Adds to the gradients of step i those of one of its so many parts.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        values = self.processes.mean(torch.stack((loss, *others)).detach()).cpu()
        self.check_finite(i, "loss", float(values.sum()))
        self._sums = self._sums + values / of
        (loss / of).backward()

    def descend(self, i: int, lr: float) -> None:
        """Moves the weights against the gradients, whose norm is kept below 1, and the average after them.

        Raises:
            ArithmeticError: the gradient is not finite; the weights are as they were.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.trained(), 1.0)
        self.check_finite(i, "gradient", norm.item())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not self.model:
            # The first weights are far from good: the average forgets them faster than ema_decay alone would.
            decay = min(self.ema_decay, (1 + i) / (10 + i))
            follow(self.average, self.model, 1 - decay)
        self.history.append(tuple(self._sums.tolist()))
        self._sums = torch.zeros_like(self._sums)

    def check_finite(self, i: int, what: str, value: float) -> None:
        """Raises ArithmeticError where the value is not finite."""
        if not math.isfinite(value):
            raise ArithmeticError(f"the {what} is not finite at step {i}: try a lower lr than {self.lr}")

    def save(self, path: Path) -> None:
        """Writes all state, where this is the first process.

        Raises:
            ArithmeticError: a weight is not finite.
        """
        with torch.no_grad():
            norms = torch._foreach_norm([*self.model.parameters(), *self.average.parameters()])
        self.check_finite(len(self.history), "norm of the weights", float(torch.stack(norms).sum()))
        if self.processes.first:
            write_checkpoint(self.state(), path)

    def state(self) -> State:
        """What a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": torch.tensor(self.history, dtype=torch.float64).reshape(-1, len(self.reported)),
        }

    def take(self, state: State, out: Path) -> None:
        """Takes over such a state, read from a folder.

        Raises:
            ValueError: it is none of this run.
        """
        try:
            self._take(state)
        except Exception as error:  # what a state of another kind trips over
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ValueError(
                f"{out / CHECKPOINT} is no whole checkpoint: delete it or use another folder ({reason})"
            ) from error

    def _take(self, state: State) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [tuple(row) for row in state["history"].tolist()]


def follow(average: nn.Module, model: nn.Module, weight: float) -> None:
    """Moves what is trained in an averaged copy towards the model: average <- average + weight (model - average)."""
    pairs = zip(average.parameters(), model.parameters(), strict=True)
    # Detached, or the average would carry the history of the weights along.
    moved = [(mean, parameter.detach()) for mean, parameter in pairs if parameter.requires_grad]
    torch._foreach_lerp_([mean for mean, _ in moved], [parameter for _, parameter in moved], weight)
