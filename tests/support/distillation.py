"""Small models to distil, and what they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsample import Schedule, distill, zoo

SMALL = distill.Settings(iterations=6, batch_size=4, warmup=2, lr=1e-2)
SHAPE = (3, 9, 6)
DATA = torch.rand(10, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.arange(10) % 3


def unet(**fields: Any) -> zoo.UNet:
    """A tiny U-Net of three classes that gives v and returns epsilon, with weights in all layers."""
    config = {"channels": 3, "image_size": (9, 6), "num_classes": 3, "widths": (8, 16), "embedding": 16, "target": "v"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        schedule = fields.pop("schedule", Schedule.cosine(100))
        model = zoo.UNet(zoo.UNetConfig(**config | fields), schedule)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return model.eval()


class Policy(nn.Module):
    """Actions (16, 7) given an observation, as a robot's: three convolutions along time."""

    schedule = Schedule.cosine(100)

    def __init__(self, outputs: int = 16) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.time, self.obs = nn.Linear(1, 32), nn.Linear(5, 32)
            self.enter, self.middle = nn.Conv1d(16, 32, 3, padding=1), nn.Conv1d(32, 32, 3, padding=1)
            self.leave = nn.Conv1d(32, outputs, 3, padding=1)
        self.eval()

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        told = self.time(t.to(x.dtype)[:, None] / 100) + self.obs(obs)
        h = torch.tanh(self.enter(x) + told[:, :, None])
        out: Tensor = self.leave(torch.tanh(self.middle(h)))
        return out


def text_to_image(**fields: Any) -> Any:
    """A tiny UNet2DConditionModel of diffusers', for latents (4, 8, 8) and prompts of 12 numbers a word."""
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **fields,
    ).eval()


OBSERVATIONS = {"obs": torch.randn(6, 5, generator=torch.Generator().manual_seed(2))}


class Delta(nn.Module):
    """The exact model of data that are one sample, `point`: every path leads there, whatever its steps."""

    def __init__(self, point: Tensor, prediction: str, schedule: Schedule) -> None:
        super().__init__()
        self.point, self.prediction, self.schedule = nn.Parameter(point), prediction, schedule
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        abar = torch.tensor(self.schedule.alphas_cumprod)[t.long()].reshape(-1, *(1,) * (x.ndim - 1))
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        epsilon = (x.double() - alpha * self.point) / sigma
        by_name = {"epsilon": epsilon, "v": alpha * epsilon - sigma * self.point, "x0": self.point.expand_as(epsilon)}
        return by_name[self.prediction].float()


METHODS = ("trajectory", "progressive", "consistency", "guided", "lcm", "lcm_lora")
# How guided is told of weights, by a model of classes.
RANGE: dict[str, Any] = {"guidance": (1.0, 3.0), "uncond": {"y": torch.tensor([3])}}


def run(name: str, model: Any, out: Path, **changes: Any) -> distill.Student:
    """A run of this method on a model of images of three classes."""
    common: dict[str, Any] = {"settings": SMALL, "progress": False} | changes
    if name == "trajectory":
        sizes = {key: common.pop(key, value) for key, value in {"steps": 2, "substeps": 2, "paths": 10}.items()}
        return distill.trajectory(model, SHAPE, out, cond={"y": torch.arange(3)}, **sizes, **common)
    data = common.pop("data", DATA)
    common = {"cond": {"y": LABELS}} | common
    if name == "progressive":
        return distill.progressive(model, data, out, **{"start": 4, "steps": 1} | common)
    if name == "guided":
        return distill.guided(model, data, out, **{"start": 2, "steps": 1} | RANGE | common)
    if name == "lcm_lora":
        return distill.lcm_lora(model, data, out, **{"scales": 6, "rank": 2} | common)
    if name == "lcm":
        return distill.lcm(model, data, out, **{"scales": 6} | common)
    return distill.consistency(model, data, out, **{"scales": 8} | common)


def weights(student: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: value.clone() for name, value in student.state_dict().items()}
