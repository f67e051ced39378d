"""The names that models' authors gave their layers: a table for each family of models."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fastsample.lora.files.original.family import Named
from fastsample.lora.files.original.flux import FLUX, FLUX2
from fastsample.lora.files.original.hunyuan import HUNYUAN_DIT, HUNYUAN_IMAGE, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from fastsample.lora.files.original.ltx import LTX
from fastsample.lora.files.original.next_dit import LUMINA2, Z_IMAGE
from fastsample.lora.files.original.sd3 import SD3
from fastsample.lora.files.original.wan import WAN
from fastsample.lora.files.prefixes import unwrapped

FAMILIES = (
    *(FLUX, FLUX2, LTX, LUMINA2, SD3, WAN, Z_IMAGE),
    *(HUNYUAN_DIT, HUNYUAN_IMAGE, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15),
)


def original_names(module: nn.Module) -> Iterator[Named]:
    """The other names of layers in a tree that holds a model of a family, and where the layers' outputs are."""
    for path, model in module.named_modules():
        prefix = f"{path}." if path else ""
        for family in FAMILIES:
            for name, parts in family.of(model):
                yield unwrapped(prefix) + name, tuple(part._replace(module=prefix + part.module) for part in parts)
