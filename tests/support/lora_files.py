"""Small models, their adapters by PEFT, and entries made by hand: what the tests of LoRA files share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsample.lora.files import formats, names
from fastsample.lora.files.formats import Entry
from fastsample.lora.files.names import Resolution
from fastsample.lora.report import refuse

DOWN, UP = torch.arange(6.0).reshape(2, 3) + 0.5, torch.arange(10.0).reshape(5, 2) - 4
PEFT = {"base_model.model.a.lora_A.weight": DOWN, "base_model.model.a.lora_B.weight": UP}


def read(source: Any, alpha: float | None = None) -> list[Entry]:
    """A file's pairs; ValueError where it holds anything else."""
    file = formats.read(source, alpha)
    refuse(Resolution({}, {left.key: left.reason for left in file.left}, {}), file.name, "module")
    return file.entries


def resolve(module: nn.Module, entries: Iterable[Entry]) -> Resolution:
    """The modules of all entries; ValueError where one that names a module does not fit it."""
    found = names.resolve(module, entries)
    bad = {key: reason for key, reason in found.unmatched.items() if reason != names._NO_MODULE}
    refuse(Resolution({}, bad, {}), "the entries", type(module).__name__)
    return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(7, 5), nn.Linear(7, 5)
        self.block = nn.ModuleDict({"q": nn.Linear(3, 9), "conv": nn.Conv2d(3, 5, 3), "point": nn.Conv2d(5, 3, 1)})


def peft_model(**config: Any) -> Any:
    peft = pytest.importorskip("peft")
    targets = ["q", "k", "conv", "point"]
    return peft.get_peft_model(Net(), peft.LoraConfig(target_modules=targets, init_lora_weights=False, **config))


def layers(model: nn.Module, adapter: str = "default") -> dict[str, tuple[Tensor, Tensor, float]]:
    """What PEFT itself holds: A, B and its scaling by module name."""
    return {
        name.removeprefix("base_model.model."): (
            module.lora_A[adapter].weight.detach(),
            module.lora_B[adapter].weight.detach(),
            module.scaling[adapter],
        )
        for name, module in model.named_modules()
        if hasattr(module, "scaling")
    }


def assert_equal(entries: list[Entry], expected: dict[str, tuple[Tensor, Tensor, float]], component: str = "") -> None:
    found = {entry.path: entry for entry in entries if entry.component == component}
    assert set(found) == set(expected)
    for path, (down, up, factor) in expected.items():
        assert torch.equal(found[path].down, down) and torch.equal(found[path].up, up), path
        assert found[path].factor == factor, path
        assert not found[path].flat


SMALL: dict[str, Any] = dict(sample_size=8, norm_num_groups=2, cross_attention_dim=6, attention_head_dim=2)


def entry(
    path: str, shape: tuple[int, ...] = (7, 5), component: str = "", flat: bool = False, key: str = "", rank: int = 2
) -> Entry:
    """An adapter of a module whose weight has this shape, its values its own."""
    down = torch.rand(rank, *shape[1:])
    up = torch.rand(shape[0], rank, *(1 for _ in shape[2:]))
    return Entry(key or path, component, path, flat, down, up, 0.5)


def entries_of(module: nn.Module, rename: Callable[[str], str] = str, **kwargs: Any) -> dict[str, Entry]:
    """One for every linear and convolution, called rename(name), by the module's own name."""
    return {
        name: entry(rename(name), tuple(layer.weight.shape), **kwargs)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def assert_resolves(module: nn.Module, entries: dict[str, Entry]) -> None:
    found = resolve(module, entries.values())
    assert set(found.entries) == set(entries) and not found.unmatched and not found.elsewhere
    for name, one in entries.items():
        assert found.entries[name] is one, name


@cache
def sd() -> Any:
    """The blocks of Stable Diffusion 1's UNet: four levels, the last without attention, two layers each."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(block_out_channels=(4, 4, 8, 8), **SMALL)


@cache
def sdxl() -> Any:
    """The blocks of SDXL's UNet: three levels, the first without attention."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            block_out_channels=(4, 8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3),
            addition_embed_type="text_time",
            addition_time_embed_dim=2,
            projection_class_embeddings_input_dim=8,
            **SMALL,
        )


def clip(projection: bool, width: int = 8, layers: int = 2) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=20,
        bos_token_id=0,
        eos_token_id=1,
        hidden_size=width,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=7,
        projection_dim=8,
    )
    with torch.device("meta"):
        kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
        return kind(config)


def flat(name: str) -> str:
    return name.replace(".", "_")


class Tree(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
