"""diffusers' attention blocks whose projections run as one: `fuse_qkv_projections` leaves the single ones unused."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fastsample.lora.files.original.family import Named, Part, rows_of
from fastsample.lora.files.prefixes import unwrapped
from fastsample.lora.files.shapes import size_of
from fastsample.lora.layers.attention import FUSED, runs_fused


def split_names(module: nn.Module) -> Iterator[Named]:
    """The names of fused projections that blocks do not have, and the single ones that stand for them."""
    for path, _, children in _blocks(module):
        for fused, singles in FUSED.items():
            if fused in children or not (rows := _rows(children, singles)):
                continue
            parts = (Part(f"{path}{single}", of=own) for single, own in zip(singles, rows, strict=True))
            yield unwrapped(path) + fused, tuple(parts)


def fused_parts(module: nn.Module) -> dict[str, Part]:
    """By the path of each single projection that a fused one runs in the place of: which of its outputs they are."""
    parts = {}
    for path, block, children in _blocks(module):
        for fused, singles in FUSED.items():
            if fused in children and runs_fused(block):
                for single, own in zip(singles, _rows(children, singles), strict=False):
                    parts[path + single] = Part(path + fused, into=own)
    return parts


def _blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Module]]]:
    """What the paths of a block's children begin with, the block with projections, and its children."""
    for path, block in module.named_modules():
        # Children, not attributes, are looked at: torch.compile's wrapper passes attributes on.
        children = dict(block.named_children())
        if "to_k" in children:
            yield f"{path}." if path else "", block, children


def _rows(children: dict[str, nn.Module], singles: tuple[str, ...]) -> list[range]:
    """The places of the single projections' outputs in a fused one's; none where one is missing."""
    sizes = [size for single in singles if (size := size_of(children.get(single)))]
    return rows_of([size[0] for size in sizes]) if len(sizes) == len(singles) else []
