"""Fine-tuning a diffusion model on a few images, by a LoRA or whole; interrupted runs continue bit for bit."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Generator, Tensor, nn

from fastsample import lora
from fastsample.checks import integer, one_of, real
from fastsample.lora.saving import PEFT_FILES
from fastsample.lora.trainable import Trainable, check_bare, check_fit
from fastsample.model import prediction_of, schedule_of, unwrapped
from fastsample.schedule import Schedule
from fastsample.storage.digests import digest_of
from fastsample.storage.writing import replacing
from fastsample.train import place
from fastsample.train.checkpoint import CHECKPOINT, State
from fastsample.train.data import ImageData
from fastsample.train.held_out import HeldOut
from fastsample.train.losses import DiffusionLoss
from fastsample.train.processes import Processes
from fastsample.train.task import Task
from fastsample.zoo.plain import plain
from fastsample.zoo.store import save
from fastsample.zoo.unet import PREDICTIONS, UNet

LORA, PEFT, FULL = "pytorch_lora_weights.safetensors", "peft", "model.safetensors"


def files_of(adapted: bool, measured: bool) -> tuple[str, ...]:
    """The names of all that a run writes beside checkpoint and report, of a LoRA and with held-out images."""
    own = (LORA, *(f"{PEFT}/{name}" for name in PEFT_FILES)) if adapted else (FULL,)
    return (*own, *HeldOut.files) if measured else own


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
        # As Python's own numbers, which checkpoints hold.
        for name in ("steps", "batch_size"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1))
        object.__setattr__(self, "warmup", integer("warmup", self.warmup, 0))
        object.__setattr__(self, "seed", integer("seed", self.seed, 0, 2**64 - 1))
        for name in ("lr", "label_dropout"):
            object.__setattr__(self, name, real(name, getattr(self, name)))
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.label_dropout <= 1:
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
    check_bare(model)
    folder = Path(out) / PEFT
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder, or not be there")
    files = files_of(rank is not None, held_out is not None)
    place.check_place(Path(out), files, (CHECKPOINT,), device, save_every)
    given, schedule, prediction = model, schedule_of(model, schedule), prediction_of(model, prediction)
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
    if isinstance(trained, Trainable):
        check_fit(trained, given)
    loss = DiffusionLoss(schedule, loss="simple", prediction=prediction)
    told = _Labels(model, labels)
    told.check("data", data)
    if held_out is not None:
        told.check("held_out", held_out)
        if held_out.shape != data.shape:
            raise ValueError(f"held_out must hold images of the data's shape {data.shape}, got {held_out.shape}")
    _probe(trained.float().eval(), data, told)
    task = _Task(trained, data, held_out, loss, told, settings, Processes(device))
    task.go(Path(out), save_every, progress)
    return task.model


class _Labels:
    """How a model is told the labels of images."""

    def __init__(self, model: nn.Module, keyword: str | None) -> None:
        config: Any = getattr(model, "config", None)
        self.none = config.num_classes or None if isinstance(model, UNet) else None
        self.classes = self.none or getattr(config, "num_class_embeds", None)
        if isinstance(model, UNet):
            if keyword is not None and (keyword != "y" or not self.none):
                wanted = "y" if self.none else "none"
                raise ValueError(f"labels must be the model's keyword for them, {wanted}; got {keyword!r}")
            keyword = "y" if self.none else None
        elif keyword is None and self.classes:
            keyword = "class_labels"
        self.keyword = keyword

    def check(self, name: str, data: ImageData) -> None:
        """Raises ValueError where these images' labels are not what the model is told."""
        if self.keyword is None:
            return
        if data.labels is None and not self.none:
            raise ValueError(f"the model is told labels as its keyword {self.keyword}, and {name} has none")
        if self.classes and data.num_classes > self.classes:
            raise ValueError(f"the model has {self.classes} classes, and {name} {data.num_classes}")

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
    device, first = next(model.parameters()).device, torch.zeros(1, dtype=torch.int64, device="cpu")
    x, keywords = data.scaled(first).to(device), told.of(data, first)
    try:
        given = unwrapped(model(x, first.to(device), **{name: value.to(device) for name, value in keywords.items()}))
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"the model does not take images of shape {data.shape}: {error}") from error
    what = tuple(given.shape[1:]) if isinstance(given, Tensor) else type(given).__name__
    channels, *size = data.shape
    if what not in ((channels, *size), (2 * channels, *size)):
        raise ValueError(f"the model must return images of the data's shape {data.shape}, got {what}")


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
        self.held_out = None if held_out is None else HeldOut(held_out, self._terms, loss.T, settings.batch_size)
        self.files = files_of(isinstance(model, Trainable), held_out is not None)
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
        held_out = None if self.held_out is None else self.held_out.data.digest()
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return settings | {
            "trained": trained,
            "model": digest_of(self.model),
            "schedule": hashlib.sha256(self.loss.schedule.alphas_cumprod.tobytes()).hexdigest(),
            "prediction": self.loss.prediction,
            "labels": self.told.keyword,
            "data": self.data.digest(),
            "held_out": held_out,
        }

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
            factors = model.lora()
            lora.save(factors, out / LORA)
            lora.save(factors, out / PEFT, format="peft")
        elif isinstance(model, UNet):
            save(model, out / FULL)
        else:
            tensors = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
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
