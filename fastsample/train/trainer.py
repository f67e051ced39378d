"""Training a UNet; interrupted runs continue bit for bit."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastsample.schedule import Schedule
from fastsample.storage.pickles import load_pickle
from fastsample.storage.writing import check_replaceable, check_writable, remove_parts, replacing, sole_writer
from fastsample.train.data import ImageData
from fastsample.train.losses import HybridLoss
from fastsample.train.report import write_report
from fastsample.zoo.store import save
from fastsample.zoo.unet import UNet, UNetConfig

_FILES = ("checkpoint.pt", "model.safetensors", "loss.csv", "loss.png")


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of a run; the defaults made the bundled digits model.

    steps: optimizer steps; timesteps: T of the cosine schedule; widths: see UNetConfig; lr: peak learning rate, reached
    after `warmup` steps and decaying to 0 as a cosine; ema_decay: of the averaged weights, which are the ones kept;
    label_dropout: how often a label is replaced by "none", for classifier-free guidance.

    Raises:
        ValueError: a value out of its range.
    """

    steps: int = 16000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 500
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    timesteps: int = 1000
    widths: tuple[int, int] = (48, 96)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= 1 << 64:
            raise ValueError(f"seed must be below 2^64, got {self.seed}")
        for name in ("lr", "weight_decay"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must lie in [0, 1], got {self.label_dropout}")


def train(
    data: ImageData,
    out: str | Path,
    settings: Settings | None = None,
    *,
    device: str | torch.device = "cpu",
    save_every: int = 500,
    progress: bool = True,
) -> UNet:
    """Trains a UNet on data and returns it with its averaged weights.

    Every save_every steps and at the end, `out` gets model.safetensors (averaged weights, see zoo.load),
    checkpoint.pt, loss.csv and loss.png. A run on a folder with a checkpoint continues it; the result does not depend
    on interruptions, since all that is random at step i is drawn from a generator seeded with (seed, i). A run that is
    killed leaves the files of the last save whole.

    Raises:
        ValueError: device cannot be used, checkpoint.pt is no checkpoint or was made with other settings or data, or
            the data do not suit the model. OSError: out cannot be written. RuntimeError: another run uses out.
        ArithmeticError: the loss is no longer finite; the last checkpoint is from before that.
    """
    settings = settings or Settings()
    out = Path(out)
    check_place(out, device, save_every)
    run = _Run(data, settings, torch.device(device))
    out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out):
        remove_parts(out, _FILES)
        if (out / "checkpoint.pt").exists():
            run.restore(out / "checkpoint.pt")
        _continue(run, out, save_every, progress)
    return run.average.eval()


def check_place(out: Path, device: str | torch.device, save_every: int) -> None:
    """Raises what train would raise for these arguments, before data are read or a folder is made."""
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).partition(chr(10))[0]}") from None
    if place.type == "meta":
        raise ValueError("device 'meta' cannot be used: nothing is computed there")
    check_writable(out)
    for name in _FILES:
        check_replaceable(out / name)


def _continue(run: _Run, out: Path, save_every: int, progress: bool) -> None:
    settings, start = run.settings, len(run.history)
    with tqdm(total=settings.steps, initial=start, disable=not progress, mininterval=5) as bar:
        for i in range(start, settings.steps):
            run.step(i)
            bar.update()
            bar.set_postfix(loss=f"{np.mean(run.history[-100:], axis=0).sum():.4f}", refresh=False)
            if (i + 1) % save_every == 0 or i + 1 == settings.steps:
                run.save(out / "checkpoint.pt")
                save(run.average, out / "model.safetensors")
                write_report(run.history, out)


class _Run:
    """The state of a run: weights, their average, the optimizer, and the (mse, vb) of every step so far."""

    def __init__(self, data: ImageData, settings: Settings, device: torch.device) -> None:
        config = UNetConfig(
            channels=data.images.shape[1],
            image_size=data.images.shape[2],
            num_classes=data.num_classes,
            widths=settings.widths,
        )
        schedule = Schedule.cosine(settings.timesteps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = UNet(config, schedule).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.loss = HybridLoss(schedule, device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.history: list[tuple[float, float]] = []
        self.data, self.settings, self.device = data, settings, device

    def step(self, i: int) -> None:
        """One optimizer step."""
        x0, t, y, noise = (part.to(self.device) for part in self._draw(i))
        xt = self.loss.q_sample(x0, t, noise)
        mse, vb = (term.mean() for term in self.loss(self.model(xt, t, y), x0, xt, t, noise))
        if not math.isfinite(mse.item() + vb.item()):
            raise ArithmeticError(f"the loss is not finite at step {i}: try a lower lr than {self.settings.lr}")
        self.optimizer.zero_grad()
        (mse + vb).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * _lr_factor(i, self.settings.steps, self.settings.warmup)
        self.optimizer.step()
        # The first weights are far from good: the average forgets them faster than ema_decay alone would.
        decay = min(self.settings.ema_decay, (1 + i) / (10 + i))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.history.append((mse.item(), vb.item()))

    def _draw(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0, t, y and noise of step i."""
        seed = int(np.random.SeedSequence((self.settings.seed, i)).generate_state(1, np.uint64)[0])
        generator = torch.Generator("cpu").manual_seed(seed)
        size, none = self.settings.batch_size, self.data.num_classes
        index = torch.randint(len(self.data.images), (size,), generator=generator, device="cpu")
        t = torch.randint(self.settings.timesteps, (size,), generator=generator, device="cpu")
        dropped = torch.rand(size, generator=generator, dtype=torch.float32, device="cpu") < self.settings.label_dropout
        x0 = self.data.scaled(index)
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float32, device="cpu")
        y = torch.full_like(t, none) if self.data.labels is None else self.data.labels[index].masked_fill(dropped, none)
        return x0, t, y, noise

    def save(self, path: Path) -> None:
        """Writes all state, replacing the file at once."""
        state = {
            "settings": self._identity(),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }
        with replacing(path) as file:
            torch.save(state, file)

    def restore(self, path: Path) -> None:
        """Takes over the state in a checkpoint; ValueError if it is none or belongs to another run."""
        state = load_pickle(path, self.device)
        settings = state.get("settings") if isinstance(state, dict) else None
        if not isinstance(settings, dict):
            raise ValueError(f"{path} is no checkpoint of fastsample train: delete it or use another folder")
        for name, value in self._identity().items():
            if settings.get(name) != value:
                raise ValueError(
                    f"{path} was made with {name} = {short(settings.get(name))}, now it is {value}: "
                    "use the same settings or another folder"
                )
        try:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history = [(float(mse), float(vb)) for mse, vb in state["history"]]
        except Exception as error:  # what a state of another kind trips over
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ValueError(f"{path} is no whole checkpoint: delete it or use another folder ({reason})") from error

    def _identity(self) -> dict[str, Any]:
        return asdict(self.settings) | {"data": self.data.digest()}


def _lr_factor(i: int, steps: int, warmup: int) -> float:
    """min((i + 1) / warmup, 1) times a half cosine from 1 at step 0 to 0 at the last."""
    return min((i + 1) / max(warmup, 1), 1.0) * 0.5 * (1 + math.cos(math.pi * i / steps))
