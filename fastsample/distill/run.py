"""The frame of all methods: batches, optimizer, stages, files; interrupted runs continue bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from time import process_time

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm import tqdm

from fastsample.distill.method import Batch, Method
from fastsample.distill.settings import PRECISIONS, Settings
from fastsample.distill.store import save
from fastsample.distill.student import Student
from fastsample.storage.digests import digest_of
from fastsample.train import place, report
from fastsample.train.checkpoint import CHECKPOINT, State, read_state
from fastsample.train.processes import Processes
from fastsample.train.run import Run


def distill(
    method: Method,
    student: Student,
    out: str | Path,
    settings: Settings,
    processes: Processes,
    *,
    save_every: int = 200,
    progress: bool = True,
) -> Student:
    """Trains a student by a method, in a folder, and returns it.

    Every save_every iterations and after every stage, `out` gets the student, checkpoint.pt, loss.csv and loss.png. A
    run on a folder with a checkpoint continues it. The result does not depend on interruptions, since all that is
    random in an iteration is drawn from a generator seeded with (seed, stage, iteration).

    Under torchrun every process calls this alike: a batch has batch_size samples of each.

    Raises:
        ValueError: device cannot be used, or `out` holds files of something else or another run. OSError: out cannot
            be written. RuntimeError: another run uses out.
        ArithmeticError: the loss, its gradient or a weight is not finite; the last checkpoint is from before that.
    """
    out, files = Path(out), files_of(method)
    place.check_place(out, files, (CHECKPOINT,), processes.device, save_every)
    method.check_place(out, (out / CHECKPOINT).exists())
    run = _Run(method, student, settings, processes)
    with place.in_use(out, files, run.processes):
        run.restore(out)
        run.go(out, save_every, progress and run.processes.first)
    return run.finished()


def files_of(method: Method) -> tuple[str, ...]:
    """The names of all files of a run."""
    return (CHECKPOINT, *dict.fromkeys(method.file(stage) for stage in range(method.stages)), *report.FILES[:2])


class _Run(Run):
    """A run whose history has the loss of every optimizer step."""

    def __init__(self, method: Method, student: Student, settings: Settings, processes: Processes) -> None:
        super().__init__(
            student.to(processes.device),
            processes,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            ema_decay=settings.ema_decay,
        )
        self.method, self.settings, self.student = method, settings, student
        # Made once: hashes of all weights and data are in it, and the weights are about to move.
        self.identity = self._identity()
        self.updates_of_stage = settings.iterations * method.updates
        # The weights that the stage began with, where a later one is about to.
        self.first: State | None = None
        # Of the CPU: what the run has cost, which decides nothing.
        self.seconds, self._clock = 0.0, process_time()

    def go(self, out: Path, save_every: int, progress: bool) -> None:
        """From where the run is to its end."""
        iterations, total = self.settings.iterations, self.settings.iterations * self.method.stages
        start = len(self.history) // self.method.updates
        if start and start % iterations == 0:
            self.publish(out, start // iterations - 1)  # a kill may have come between the checkpoint and these
        with tqdm(total=total, initial=start, disable=not progress, mininterval=5) as bar:
            for i in range(start, total):
                if i == start or i % iterations == 0:
                    self.begin(i, out, progress)
                self.step(i)
                bar.update()
                bar.set_postfix(loss=f"{np.mean([loss for (loss,) in self.history[-100:]]):.4f}", refresh=False)
                if (i + 1) % iterations == 0 or (i + 1) % save_every == 0:
                    self.save(out / CHECKPOINT)
                    self.publish(out, i // iterations)
        if self.processes.first:
            self.method.end(out)

    def begin(self, i: int, out: Path, progress: bool) -> None:
        """Begins the stage of this iteration, or takes it up."""
        stage, later = divmod(i, self.settings.iterations)
        if later == 0 and stage:
            self.model.load_state_dict(self.average.state_dict())
            self.optimizer = self.new_optimizer()
        if later == 0:
            self.first = copy.deepcopy(self.model.state_dict()) if stage else None
        if i == 0 and not (out / CHECKPOINT).exists():
            self.save(out / CHECKPOINT)  # tells whose the folder is while a method prepares
        began = self.student
        if later and stage:
            began = copy.deepcopy(self.student)
            began.load_state_dict(self.first or {})
        self.method.begin(stage, began, out, self.processes, progress)

    def step(self, i: int) -> None:
        """One iteration: a batch, in its parts, and the optimizer steps that it makes."""
        stage, later = divmod(i, self.settings.iterations)
        parts = [self._losses(stage, batch) for batch in self._batches(stage, later)]
        for k in range(self.method.updates):
            update = later * self.method.updates + k
            for losses in parts:
                self.accumulate(i, next(losses), of=len(parts))
            self.descend(i, self.settings.lr_at(update, self.updates_of_stage))
            self.method.moved(self.student)

    def _losses(self, stage: int, batch: Batch) -> Iterator[Tensor]:
        dtype = PRECISIONS[self.settings.precision]
        losses = self.method.losses(self.called, stage, batch)
        for _ in range(self.method.updates):
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                loss = next(losses)
            yield loss.float()

    def _batches(self, stage: int, later: int) -> Iterator[Batch]:
        settings, processes = self.settings, self.processes
        words = (settings.seed, stage, later)
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
        part, first = settings.batch_size // settings.accumulate, settings.batch_size * processes.rank
        for k in range(settings.accumulate):
            # Every part draws the whole batch and takes its own of it.
            generator = Generator("cpu").manual_seed(seed)
            bounds = (first + k * part, first + (k + 1) * part)
            yield Batch(generator, settings.batch_size * processes.count, bounds, self.device, later)

    def publish(self, out: Path, stage: int) -> None:
        """Writes the student of a stage and the report."""
        if self.processes.first:
            save(self.finished(stage), out / self.method.file(stage))
            report.write_report(self.history, self.reported, out)

    def finished(self, stage: int | None = None) -> Student:
        """The student as it is used, with the averaged weights."""
        stage = self.method.stages - 1 if stage is None else stage
        average = self.average
        assert isinstance(average, Student)
        average.facts = self.method.facts(stage)
        return average.eval()

    def state(self) -> State:
        """What a checkpoint holds."""
        now = process_time()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        own = {
            "settings": self.identity,
            "first": self.first,
            "method": self.method.state(),
            "seconds": self.seconds,
        }
        return own | super().state()

    def _take(self, state: State) -> None:
        super()._take(state)
        self.first, self.seconds = state["first"], state["seconds"]
        self.method.take(state["method"])

    def restore(self, out: Path) -> None:
        """Takes over the state in a folder, if there is one.

        Raises:
            ValueError: it is none of this run.
        """
        if (out / CHECKPOINT).exists():
            command = f"fastsample distill {self.method.name}"
            state = read_state(out / CHECKPOINT, self.identity, self.device, 1, command)
            if len(state["history"]) > self.updates_of_stage * self.method.stages:
                raise ValueError(f"{out / CHECKPOINT} has gone further than this run would: use another folder")
            self.take(state, out)

    def _identity(self) -> State:
        trained = [name for name, parameter in self.student.named_parameters() if parameter.requires_grad]
        student = {"student": digest_of(self.student), "output": self.student.output, "trained": trained}
        identity = {"method": self.method.name} | self.method.identity() | student | asdict(self.settings)
        identity["batch_size"] *= self.processes.count
        return identity
