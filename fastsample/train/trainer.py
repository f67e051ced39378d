"""Training a UNet; interrupted runs continue bit for bit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastsample.train import place, report
from fastsample.train.checkpoint import CHECKPOINT, TRUNK, State, read_checkpoint
from fastsample.train.data import ImageData
from fastsample.train.latents import LatentData
from fastsample.train.losses import DiffusionLoss
from fastsample.train.processes import Processes
from fastsample.train.run import Run
from fastsample.train.settings import Settings
from fastsample.train.timesteps import TIMESTEP_SAMPLERS, ImportanceTimesteps
from fastsample.zoo.store import save
from fastsample.zoo.unet import UNet, UNetConfig

_MODEL = "model.safetensors"
_FILES = (CHECKPOINT, TRUNK, _MODEL, *report.FILES)


def train(
    data: ImageData | LatentData,
    out: str | Path,
    settings: Settings | None = None,
    *,
    device: str | torch.device = "cpu",
    save_every: int = 500,
    progress: bool = True,
) -> UNet:
    """Trains a UNet on images, or on latents of them, and returns it with its averaged weights.

    Every save_every steps and at the end, `out` gets model.safetensors (averaged weights, see zoo.load),
    checkpoint.pt, loss.csv and loss.png, with importance sampling also timesteps.csv; and once, before the cooldown,
    trunk.pt. A run on a folder with a checkpoint continues it, and one for more steps extends it; the result does not
    depend on interruptions or extensions, since all that is random at step i is drawn from a generator seeded with
    (seed, i), and the learning rate knows the number of steps in the cooldown alone. A run that is killed leaves the
    files of the last save whole.

    Under torchrun every process calls this alike: a step has batch_size images of each.

    Raises:
        ValueError: device cannot be used, `out` holds files of something else or a run with other settings or data, or
            the data do not suit the model. OSError: out cannot be written. RuntimeError: another run uses out.
        ArithmeticError: the loss, its gradient or a weight is not finite; the last checkpoint is from before that.
    """
    settings = settings or Settings()
    out = Path(out)
    check_place(out, device, save_every)
    run = _Run(data, settings, Processes(device))
    with place.in_use(out, _FILES, run.processes):
        run.restore(out)
        _continue(run, out, save_every, progress and run.processes.first)
    return cast(UNet, run.average.eval())


def check_place(out: Path, device: str | torch.device, save_every: int) -> None:
    """Raises what train would raise for these arguments, before data are read or a folder is made."""
    place.check_place(out, _FILES, (CHECKPOINT, TRUNK), device, save_every)


def _continue(run: _Run, out: Path, save_every: int, progress: bool) -> None:
    settings, start = run.settings, len(run.history)
    with tqdm(total=settings.steps, initial=start, disable=not progress, mininterval=5) as bar:
        for i in range(start, settings.steps):
            if i == settings.cooldown_start():
                run.save(out / TRUNK)
            run.step(i)
            bar.update()
            bar.set_postfix(loss=f"{np.mean([loss for loss, *_ in run.history[-100:]]):.4f}", refresh=False)
            if (i + 1) % save_every == 0 and i + 1 < settings.steps:
                run.save(out / CHECKPOINT)
                run.publish(out)
    if start < settings.steps:
        run.save(out / CHECKPOINT)
    # Also where nothing was left to do: a kill may have come between the checkpoint and these.
    run.publish(out)


class _Run(Run):
    """A run whose history is (loss, mse, vb)."""

    reported = ("loss", "mse", "vb")

    def __init__(self, data: ImageData | LatentData, settings: Settings, processes: Processes) -> None:
        schedule = settings.forward_process()
        self.loss = DiffusionLoss(
            schedule,
            loss=settings.loss,
            prediction=settings.prediction,
            variance=settings.variance,
            target=settings.target,
        )
        config = UNetConfig.fitting(
            channels=data.shape[0],
            size=tuple(data.shape[1:]),  # type: ignore[arg-type]
            fold=1 if isinstance(data, LatentData) else None,
            num_classes=data.num_classes,
            prediction=settings.prediction,
            target=settings.target,
            learned_variance=self.loss.learns_variance,
            **({} if settings.widths is None else {"widths": settings.widths}),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = UNet(config, schedule).to(processes.device)
        super().__init__(
            model, processes, lr=settings.lr, weight_decay=settings.weight_decay, ema_decay=settings.ema_decay
        )
        self.timesteps = TIMESTEP_SAMPLERS[settings.timestep_sampler](settings.timesteps)
        self.data, self.settings = data, settings

    def step(self, i: int) -> None:
        """One optimizer step."""
        x0, t, y, noise, weights = (self.processes.part(whole).to(self.device) for whole in self._draw(i))
        xt = self.loss.q_sample(x0, t, noise)
        terms = self.loss(self.called(xt, t, y), x0, xt, t, noise)
        loss, mse, vb = ((weights * term).mean() for term in terms)
        self.accumulate(i, loss, mse, vb)
        self.descend(i, self.settings.lr_at(i))
        self.timesteps.update(t, terms.loss)

    def _draw(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x0, t, y, noise and the weights of step i, for all processes."""
        seed = int(np.random.SeedSequence((self.settings.seed, i)).generate_state(1, np.uint64)[0])
        generator = torch.Generator("cpu").manual_seed(seed)
        size, none = self.settings.batch_size * self.processes.count, self.data.num_classes
        index = torch.randint(self.data.count, (size,), generator=generator, device="cpu")
        t, weights = self.timesteps.sample(size, generator)
        dropped = torch.rand(size, generator=generator, dtype=torch.float32, device="cpu") < self.settings.label_dropout
        x0 = self.data.scaled(index)
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float32, device="cpu")
        y = torch.full_like(t, none) if self.data.labels is None else self.data.labels[index].masked_fill(dropped, none)
        return x0, t, y, noise, weights

    def publish(self, out: Path) -> None:
        """Writes the averaged model and the report."""
        if self.processes.first:
            save(cast(UNet, self.average), out / _MODEL)
            importance = isinstance(self.timesteps, ImportanceTimesteps)
            probabilities = self.timesteps.probabilities() if importance else None
            report.write_report(self.history, self.reported, out, probabilities)

    def state(self) -> State:
        """What a checkpoint holds."""
        return {
            "settings": self._identity(),
            "steps": self.settings.steps,
            "cooldown_start": self.settings.cooldown_start(),
            "timestep_sampler": self.timesteps.state_dict(),
        } | super().state()

    def _take(self, state: State) -> None:
        super()._take(state)
        self.timesteps.load_state_dict(state["timestep_sampler"])

    def restore(self, out: Path) -> None:
        """Takes over the state in a folder, if there is one.

        Raises:
            ValueError: it is none of this run.
        """
        settings = self.settings
        state = read_checkpoint(out, self._identity(), settings.steps, settings.cooldown_start(), self.device)
        if state is not None:
            self.take(state, out)

    def _identity(self) -> State:
        """All that decides the outcome but the number of steps."""
        settings = asdict(self.settings)
        del settings["steps"]
        settings["batch_size"] *= self.processes.count
        return settings | {"data": self.data.digest()}
