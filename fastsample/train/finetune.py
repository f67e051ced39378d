"""Fine-tuning a diffusion model on a few images, by a LoRA or whole; interrupted runs continue bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Generator, Tensor, nn

from fastsample import lora
from fastsample.checks import integer, one_of, real
from fastsample.lora.trainable import Trainable
from fastsample.model import prediction_of, schedule_of, unwrapped
from fastsample.schedule import Schedule
from fastsample.storage.writing import replacing
from fastsample.train.checkpoint import State
from fastsample.train.data import ImageData
from fastsample.train.held_out import HeldOut
from fastsample.train.losses import DiffusionLoss
from fastsample.train.processes import Processes
from fastsample.train.task import Task
from fastsample.zoo.plain import plain
from fastsample.zoo.store import save
from fastsample.zoo.unet import PREDICTIONS, UNet

LORA, PEFT, FULL = "pytorch_lora_weights.safetensors", "peft", "model.safetensors"


@dataclass(frozen=True)
class FinetuneSettings:
    """What decides the outcome of a fine-tuning.

    Args:
        steps: optimizer steps.
        batch_size: images per step, of each process.
        lr: peak learning rate of AdamW, reached after `warmup` steps, from where it falls to 0 linearly. A LoRA wants
            ten times that of the whole model.
        label_dropout: how often a label is replaced by "none", for guidance; only for models of the zoo.
        seed: of A and of every batch.

    Raises:
        ValueError, TypeError: a value out of its range, or of another type.
    """

    steps: int = 500
    batch_size: int = 16
    lr: float = 1e-3
    warmup: int = 20
    label_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            integer(name, getattr(self, name), 1)
        integer("warmup", self.warmup, 0)
        integer("seed", self.seed, 0, 2**64 - 1)
        if not 0 < real("lr", self.lr) < float("inf"):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= real("label_dropout", self.label_dropout) <= 1:
            raise ValueError(f"label_dropout must lie in [0, 1], got {self.label_dropout}")


def finetune(
    model: nn.Module,
    data: ImageData,
    out: str | Path,
    *,
    held_out: ImageData | None = None,
    rank: int | None = 8,
    targets: Sequence[str] | None = None,
    labels: str | None = None,
    schedule: Schedule | None = None,
    prediction: str | None = None,
    settings: FinetuneSettings | None = None,
    device: str | torch.device = "cpu",
    save_every: int = 50,
    progress: bool = True,
) -> nn.Module:
    """Trains a LoRA of a model on images, W staying as it is, or the whole model (Hu et al. 2021).

        loss = mean (target - output of the model for alpha x0 + sigma z)^2 over images, timesteps and noise

    with the target that the model predicts. Every save_every steps and at the end `out` gets what is trained: of a LoRA
    pytorch_lora_weights.safetensors, as `lora.attach` and diffusers' load_lora_weights read it, and peft/, a folder for
    PeftModel.from_pretrained; of a whole model model.safetensors. Beside it lie checkpoint.pt, loss.csv and loss.png,
    and with held_out also held-out.csv and held-out.png: the loss on these images, from the same noise every time.

    Args:
        model: of the zoo, of diffusers (UNet2DModel) or any torch module that is called as model(x, t). It is copied.
        data: the images; a model of the zoo is told their labels.
        out: the folder. A run on one with a checkpoint continues it.
        held_out: images that are not trained on.
        rank, targets: of the LoRA, see lora.Trainable. A rank of None trains the whole model.
        labels: the model's keyword for labels; None is "y" for a model of the zoo, "class_labels" for one of diffusers'
            with classes, and no keyword else.
        schedule, prediction: the model's; default as for fastsample.ddim.
        settings: what decides the outcome beside these.

    Returns:
        A lora.Trainable, or the whole model, in eval mode.

    Raises:
        ValueError, TypeError: arguments that cannot work, or `out` holds files of something else or another run.
        OSError: out cannot be written. RuntimeError: another run uses out.
        ArithmeticError: the loss, its gradient or a weight is not finite; the last checkpoint is from before that.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from fastsample import Schedule, zoo
        >>> model = zoo.UNet(zoo.UNetConfig(widths=(8, 16), target="v"), Schedule.cosine(100)).eval()
        >>> images = ImageData(torch.zeros(6, 1, 28, 28, dtype=torch.uint8), torch.arange(6))
        >>> short = {"settings": FinetuneSettings(steps=1, batch_size=2), "progress": False}
        >>> with TemporaryDirectory() as out:
        ...     adapted = finetune(model, images, out, rank=2, **short)
        ...     len(lora.attach(model, Path(out, "pytorch_lora_weights.safetensors"), name="style").matched)
        17
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    schedule, prediction = schedule_of(model, schedule), prediction_of(model, prediction)
    if isinstance(model, UNet):
        model = plain(model)
        prediction = model.prediction
    one_of("prediction", prediction, PREDICTIONS)
    settings = settings or FinetuneSettings()
    trained = (
        copy.deepcopy(model).requires_grad_(True)
        if rank is None
        else Trainable(model, rank, targets=targets, seed=settings.seed)
    )
    loss = DiffusionLoss(schedule, loss="simple", prediction=prediction)
    told = _Labels(model, labels, data)
    _probe(trained, data, told)
    task = _Task(trained.float().eval(), data, held_out, loss, told, settings, Processes(device))
    task.go(Path(out), save_every, progress)
    return task.model


class _Labels:
    """How a model is told the labels of images."""

    def __init__(self, model: nn.Module, keyword: str | None, data: ImageData) -> None:
        self.none = model.config.num_classes if isinstance(model, UNet) else None
        if keyword is None and isinstance(model, UNet):
            keyword = "y" if self.none else None
        elif keyword is None and getattr(getattr(model, "config", None), "num_class_embeds", None):
            keyword = "class_labels"
        self.keyword = keyword
        if keyword is not None and not self.none and data.labels is None:
            raise ValueError(f"the model is told labels as its keyword {keyword}, and the images have none")
        if self.none and data.num_classes > self.none:
            raise ValueError(f"the model has {self.none} classes, and the images {data.num_classes}")

    def of(self, data: ImageData, index: Tensor, dropped: Tensor | None = None) -> Mapping[str, Tensor]:
        """The keywords for these images; `dropped` are those whose label is left out."""
        if self.keyword is None:
            return {}
        if data.labels is None:
            assert self.none is not None
            return {self.keyword: torch.full_like(index, self.none)}
        labels = data.labels[index]
        if self.none and dropped is not None:
            labels = labels.masked_fill(dropped, self.none)
        return {self.keyword: labels}


@torch.no_grad()
def _probe(model: nn.Module, data: ImageData, told: _Labels) -> None:
    """Raises ValueError where the model does not take such images."""
    device = next(model.parameters()).device
    x, t, first = data.scaled(torch.arange(1)), torch.zeros(1, dtype=torch.int64), torch.arange(1)
    keywords = {name: value.to(device) for name, value in told.of(data, first).items()}
    given = unwrapped(model(x.to(device), t.to(device), **keywords))
    shape = tuple(x.shape[1:])
    if (
        not isinstance(given, Tensor)
        or given.shape[2:] != x.shape[2:]
        or given.shape[1] not in (shape[0], 2 * shape[0])
    ):
        raise ValueError(f"the model must return images of the data's shape {shape}, got {tuple(given.shape[1:])}")


class _Task(Task):
    command = "fastsample finetune"

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        held_out: ImageData | None,
        loss: DiffusionLoss,
        told: _Labels,
        settings: FinetuneSettings,
        processes: Processes,
    ) -> None:
        self.data, self.loss, self.told, self.settings = data, loss, told, settings
        self.held_out = None if held_out is None else HeldOut(held_out, self._terms, loss.T)
        own = (LORA,) if isinstance(model, Trainable) else (FULL,)
        self.files = own if held_out is None else (*own, *HeldOut.files)
        super().__init__(
            model.to(processes.device),
            processes,
            steps=settings.steps,
            warmup=settings.warmup,
            lr=settings.lr,
            ema_decay=0.0,
            seed=settings.seed,
        )

    def identity(self) -> State:
        settings = asdict(self.settings)
        settings["batch_size"] *= self.processes.count
        trained = sum(p.numel() for p in self.trained())
        held_out = None if self.held_out is None else self.held_out.data.digest()
        return settings | {"data": self.data.digest(), "held_out": held_out, "trained": trained}

    def losses(self, generator: Generator) -> tuple[Tensor, ...]:
        size, data = self.settings.batch_size, self.data
        index = self.draw(data.count, size, generator)
        t = self.draw(self.loss.T, size, generator)
        dropped = self.draw(1 << 20, size, generator) < self.settings.label_dropout * (1 << 20)
        noise = self.normals((size, *data.shape), generator)
        return (self._terms(data, index, t, noise, dropped).mean(),)

    def _terms(self, data: ImageData, index: Tensor, t: Tensor, noise: Tensor, dropped: Tensor | None = None) -> Tensor:
        x0, t, noise = data.scaled(index).to(self.device), t.to(self.device), noise.to(self.device)
        told = {name: value.to(self.device) for name, value in self.told.of(data, index, dropped).items()}
        xt = self.loss.q_sample(x0, t, noise)
        output: Any = unwrapped(self.called(xt, t, **told))
        return self.loss(output[:, : x0.shape[1]], x0, xt, t, noise).loss

    def evaluated(self, step: int) -> None:
        if self.held_out is not None:
            self.held_out.measure(step)

    def publish(self, out: Path) -> None:
        model = self.model
        if isinstance(model, Trainable):
            lora.save(model.lora(), out / LORA)
            lora.save(model.lora(), out / PEFT, format="peft")
        elif isinstance(model, UNet):
            save(model, out / FULL)
        else:
            tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
            with replacing(out / FULL) as file:
                file.write(safetensors.torch.save(tensors))
        if self.held_out is not None:
            self.held_out.write(out)

    def state(self) -> State:
        return super().state() | {"measured": [] if self.held_out is None else self.held_out.measured}

    def _take(self, state: State) -> None:
        super()._take(state)
        if self.held_out is not None:
            self.held_out.measured = [tuple(row) for row in state["measured"]]
