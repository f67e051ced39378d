"""Fine-tuning, by a LoRA and whole: what it leaves, what it asks for, and that interruptions change nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample import Schedule, lora, zoo
from fastsample.cli import main
from fastsample.generation import named_model
from fastsample.train import FinetuneSettings, ImageData, finetune
from fastsample.train.finetune import _Task
from support.distillation import unet
from support.interruption import stopped_at

GENERATOR = torch.Generator().manual_seed(0)
DATA = ImageData(torch.randint(0, 256, (8, 3, 9, 6), dtype=torch.uint8, generator=GENERATOR), torch.arange(8) % 3)
HELD_OUT = ImageData(DATA.images[:3].flip(3), DATA.labels[:3])  # type: ignore[index]
SMALL = FinetuneSettings(steps=6, batch_size=4, warmup=2, lr=1e-2)
KINDS: dict[str, dict[str, Any]] = {"lora": {"rank": 2}, "whole": {"rank": None}}


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsample.train.report._plot", lambda *arguments: None)


class Plain(nn.Module):
    """A model of no library, without labels."""

    schedule = Schedule.linear(100)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.body(x) + t.to(x.dtype)[:, None, None, None] / 100
        return out


def made(out: Path, model: nn.Module | None = None, **changes: Any) -> nn.Module:
    options = {"settings": SMALL, "progress": False, "rank": 2, "held_out": HELD_OUT} | changes
    return finetune(unet() if model is None else model, DATA, out, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(kind: str, tmp_path: Path) -> None:
    lr = 3e-2 if kind == "lora" else 3e-3
    settings = FinetuneSettings(steps=60, batch_size=8, warmup=5, lr=lr)
    made(tmp_path, settings=settings, held_out=DATA, **KINDS[kind])
    with (tmp_path / "held-out.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < 0.97 * losses[0]


def test_the_model_is_left_as_it_was_and_the_lora_is_for_it(tmp_path: Path) -> None:
    model = unet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = made(tmp_path, model)
    assert isinstance(adapted, lora.Trainable)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x, t, y = DATA.scaled(torch.arange(2)), torch.tensor([20, 70]), torch.tensor([0, 1])
    lora.attach(model, tmp_path / "pytorch_lora_weights.safetensors")
    other = unet()
    lora.attach(other, tmp_path / "peft")
    with torch.no_grad():
        v = adapted(x, t, y)
        alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in model._levels(t))
        epsilon = sigma * x + alpha * v
        torch.testing.assert_close(model(x, t, y)[:, :3], epsilon, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other(x, t, y), model(x, t, y), rtol=1e-5, atol=1e-5)


def test_a_whole_model_is_one_of_the_zoo(tmp_path: Path) -> None:
    model = made(tmp_path, rank=None)
    again = zoo.load(tmp_path / "model.safetensors")
    x, t, y = DATA.scaled(torch.arange(2)), torch.tensor([20, 70]), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(again(x, t, y), model(x, t, y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [3])
def test_resuming_is_exact(kind: str, at: int, tmp_path: Path) -> None:
    made(tmp_path / "straight", save_every=2, **KINDS[kind])
    with stopped_at(_Task, at):
        made(tmp_path / "broken", save_every=2, **KINDS[kind])
    made(tmp_path / "broken", save_every=2, **KINDS[kind])
    file = "model.safetensors" if kind == "whole" else "peft/adapter_model.safetensors"
    for name in (file, "loss.csv", "held-out.csv"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name


def test_any_module(tmp_path: Path) -> None:
    adapted = made(tmp_path / "lora", Plain())
    assert sum(p.requires_grad for p in adapted.parameters()) == 4
    made(tmp_path / "whole", Plain(), rank=None)
    assert (tmp_path / "whole" / "model.safetensors").is_file()


@pytest.mark.parametrize("classes", [None, 3], ids=["no classes", "classes"])
def test_a_model_of_diffusers(classes: int | None, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=(8, 8),
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        num_class_embeds=classes,
    )
    model.save_pretrained(tmp_path / "unet")
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    data = ImageData(images, torch.arange(4) % 3)
    loaded, _ = named_model(f"diffusers:{tmp_path}")
    finetune(loaded, data, tmp_path / "out", rank=2, schedule=Schedule.linear(), settings=SMALL, progress=False)
    assert lora.attach(model, tmp_path / "out" / "pytorch_lora_weights.safetensors").matched


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no module": ({"model": lambda x, t: x}, "model must be a torch module"),
    "no rank": ({"rank": 0}, "rank must be at least 1"),
    "layers that are not there": ({"targets": ["to_q"]}, "none is named 'to_q'"),
    "images of another size": ({"model": unet(image_size=(8, 8))}, "x must be"),
    "too few classes": ({"model": unet(num_classes=2)}, "the model has 2 classes, and data 3"),
    "held-out images of more classes": (
        {"held_out": ImageData(DATA.images[:2], torch.tensor([0, 5]))},
        "the model has 3 classes, and held_out 6",
    ),
    "held-out images of another size": (
        {"held_out": ImageData(torch.zeros(2, 3, 6, 6, dtype=torch.uint8))},
        r"held_out must hold images of the data's shape \(3, 9, 6\), got \(3, 6, 6\)",
    ),
    "a model without labels": ({"model": unet(num_classes=0), "labels": "y"}, "labels must be the model's keyword"),
    "a LoRA of what is left out": (
        {"targets": ["leave"]},
        "targets: leave cannot have a LoRA, as the",
    ),
    "no such device": ({"device": "nonsense"}, "device"),
    "no saving": ({"save_every": 0}, "save_every must be at least 1"),
    "a prediction": ({"model": Plain(), "prediction": "flow"}, "prediction must be one of"),
    "labels without a keyword": ({"model": Plain(), "labels": "y"}, "unexpected keyword"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=REFUSED[name][1]):
        made(tmp_path / "out", **REFUSED[name][0])
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_run(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(ValueError, match="model = "):
        made(tmp_path, rank=3)
    with pytest.raises(ValueError, match="model = "):
        made(tmp_path, unet(embedding=32))
    with pytest.raises(ValueError, match="data = "):
        finetune(unet(), HELD_OUT, tmp_path, rank=2, held_out=HELD_OUT, settings=SMALL, progress=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("digits", "model must be zoo:digits"),
        ("python:math", "model must be zoo:digits"),
        ("python:math:nothing", "math has no function 'nothing'"),
        ("python:os:getcwd", "must return a model, got str"),
        ("python:no_such_module:f", "No module named"),
        ("zoo:nowhere.safetensors", "no model at"),
        ("diffusers:nowhere", "no UNet at"),
    ],
)
def test_models_that_are_none(model: str, message: str) -> None:
    with pytest.raises((ImportError, OSError, ValueError), match=message):
        named_model(model)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsample.commands.finetune.load_data", lambda _: DATA)
    monkeypatch.setattr("fastsample.zoo.digits", unet)
    options = ["--steps", "2", "--batch-size", "2", "--rank", "2", "--held-out", "0.25"]
    assert main(["finetune", "--data", "x", "--out", str(tmp_path / "lora"), *options]) == 0
    printed = capsys.readouterr().out
    assert "6 images; " in printed and "fastsample.lora.attach(model, " in printed
    assert main(["finetune", "--data", "x", "--out", str(tmp_path / "whole"), *options, "--full"]) == 0
    assert main(["finetune", "--data", "x", "--out", str(tmp_path / "none"), *options, "--held-out", "2"]) == 2
    assert "--held-out must be a share" in capsys.readouterr().err


@pytest.mark.parametrize("there", ["a file", "files of one's own"])
def test_a_folder_of_ones_own_for_peft_is_left_alone(there: str, tmp_path: Path) -> None:
    place = tmp_path / "peft"
    if there == "a file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "adapter_model.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="peft"):
        made(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_weights_that_are_tied(tmp_path: Path) -> None:
    model = Plain()
    model.again = model.body[0]
    made(tmp_path, model, rank=None)
    assert (tmp_path / "model.safetensors").is_file()


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    import numpy as np

    settings = FinetuneSettings(steps=np.int64(2), batch_size=4, lr=np.float32(1e-3))  # type: ignore[arg-type]
    for _ in range(2):
        made(tmp_path, settings=settings)


def test_adapters_that_are_there_already_are_refused(tmp_path: Path) -> None:
    model = unet()
    lora.attach(model, made(tmp_path / "first").lora())
    for rank in (2, None):
        with pytest.raises(ValueError, match="detach them first"):
            made(tmp_path / "second", model, rank=rank)
