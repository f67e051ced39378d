"""A training of one stage: a model, a loss and a folder; interrupted runs continue bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from fastsample.train import place, report
from fastsample.train.checkpoint import CHECKPOINT, State, read_state
from fastsample.train.processes import Processes
from fastsample.train.run import Run


class Task(Run):
    """A run whose steps are alike. All that is random in one is drawn from a generator seeded with (seed, step).

    Subclasses say what is trained on what, and may have more columns in `reported`.

    Attributes:
        command: what makes such folders, as texts name it.
        files: the names of all that it writes beside checkpoint and report.
    """

    command: str
    files: tuple[str, ...]

    def __init__(
        self, model: nn.Module, processes: Processes, *, steps: int, warmup: int, lr: float, ema_decay: float, seed: int
    ) -> None:
        super().__init__(model, processes, lr=lr, weight_decay=0.0, ema_decay=ema_decay)
        self.steps, self.warmup, self.seed = steps, warmup, seed
        # Made once: hashes of data and weights may be in it, and the weights are about to move.
        self.known_by = self.identity()

    def identity(self) -> State:
        """All that decides the outcome, as texts and numbers."""
        raise NotImplementedError

    def losses(self, generator: Generator) -> tuple[Tensor, ...]:
        """The loss of a step, and what else is reported."""
        raise NotImplementedError

    def publish(self, out: Path) -> None:
        """Writes what has been trained; only the first process is asked."""
        raise NotImplementedError

    def evaluated(self, step: int) -> None:
        """Called after so many steps, before a checkpoint is written."""

    def step(self, i: int) -> None:
        """One optimizer step; the learning rate rises during the warmup and then falls to 0 linearly."""
        seed = int(np.random.SeedSequence((self.seed, i)).generate_state(1, np.uint64)[0])
        self.accumulate(i, *self.losses(Generator("cpu").manual_seed(seed)))
        self.descend(i, self.lr * min((i + 1) / max(self.warmup, 1), 1.0) * (1 - i / self.steps))

    def go(self, out: Path, save_every: int, progress: bool) -> None:
        """From what the folder has to the end.

        Raises:
            ValueError: `out` holds files of something else or another run. OSError: out cannot be written.
                RuntimeError: another run uses out.
            ArithmeticError: the loss, its gradient or a weight is not finite; the last checkpoint is from before that.
        """
        files = (CHECKPOINT, *self.files, *report.FILES[:2])
        place.check_place(out, files, (CHECKPOINT,), self.device, save_every)
        with place.in_use(out, files, self.processes):
            if (out / CHECKPOINT).exists():
                columns = len(self.reported)
                self.take(read_state(out / CHECKPOINT, self.known_by, self.device, columns, self.command), out)
            self._go(out, save_every, progress and self.processes.first)

    def _go(self, out: Path, save_every: int, progress: bool) -> None:
        start = len(self.history)
        if start == 0:
            self.evaluated(0)
        with tqdm(total=self.steps, initial=start, disable=not progress, mininterval=5) as bar:
            for i in range(start, self.steps):
                self.step(i)
                bar.update()
                bar.set_postfix(loss=f"{np.mean([row[0] for row in self.history[-100:]]):.4f}", refresh=False)
                if (i + 1) % save_every == 0 or i + 1 == self.steps:
                    self.evaluated(i + 1)
                    self.save(out / CHECKPOINT)
                    self._publish(out)
        if start == self.steps:  # a kill may have come between the checkpoint and these
            self._publish(out)

    def _publish(self, out: Path) -> None:
        if self.processes.first:
            self.publish(out)
            report.write_report(self.history, self.reported, out)

    def state(self) -> State:
        """What a checkpoint holds."""
        return {"settings": self.known_by} | super().state()

    def draw(self, count: int, size: int, generator: Generator) -> Tensor:
        """Numbers below count, int64: this process's share of `size` for each."""
        whole = torch.randint(count, (size * self.processes.count,), generator=generator, device="cpu")
        return self.processes.part(whole)

    def normals(self, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Standard normals, float32: this process's share of shape[0] for each."""
        whole = torch.randn(
            shape[0] * self.processes.count, *shape[1:], generator=generator, dtype=torch.float32, device="cpu"
        )
        return self.processes.part(whole).to(self.device)
