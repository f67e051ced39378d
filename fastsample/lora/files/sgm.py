"""The original UNet's names (ldm, sgm) of a diffusers UNet's modules: kohya's SDXL files are written in them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_DOWNSAMPLER = {"conv": "op"}


def sgm_names(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs (the original's name, the module's own name) for every diffusers UNet in the tree.

    The original numbers all blocks in one sequence, in which a downsampler is a block too. The tree tells how many
    blocks there are.
    """
    for name, unet in module.named_modules():
        # Children, not attributes, are looked at: torch.compile's wrapper passes attributes on.
        if not {"down_blocks", "mid_block", "up_blocks"} <= {child for child, _ in unet.named_children()}:
            continue
        prefix = f"{name}." if name else ""
        outer = prefix.replace("_orig_mod.", "")
        inside = {path for path, _ in unet.named_modules()}
        for path, original in _OUTSIDE.items():
            if path in inside:
                yield outer + original, prefix + path
        for path, original, renamed in _blocks(unet):
            for inner, _ in unet.get_submodule(path).named_modules():
                if inner:
                    yield f"{outer}{original}.{renamed.get(inner, inner)}", f"{prefix}{path}.{inner}"


def _blocks(unet: nn.Module) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(path in the module, original name, renamed children) of every resnet, attention and sampler."""
    i = 0
    for b, block in enumerate(unet.get_submodule("down_blocks").children()):
        path = f"down_blocks.{b}"
        for layer in range(_count(block, "resnets")):
            i += 1
            yield f"{path}.resnets.{layer}", f"input_blocks.{i}.0", _RESNET
            if layer < _count(block, "attentions"):
                yield f"{path}.attentions.{layer}", f"input_blocks.{i}.1", {}
        if _count(block, "downsamplers"):
            i += 1
            yield f"{path}.downsamplers.0", f"input_blocks.{i}.0", _DOWNSAMPLER
    middle = unet.get_submodule("mid_block")
    for layer in range(_count(middle, "resnets")):
        yield f"mid_block.resnets.{layer}", f"middle_block.{2 * layer}", _RESNET
    for layer in range(_count(middle, "attentions")):
        yield f"mid_block.attentions.{layer}", f"middle_block.{2 * layer + 1}", {}
    i = 0
    for b, block in enumerate(unet.get_submodule("up_blocks").children()):
        path = f"up_blocks.{b}"
        for layer in range(_count(block, "resnets")):
            part = 1
            yield f"{path}.resnets.{layer}", f"output_blocks.{i}.0", _RESNET
            if layer < _count(block, "attentions"):
                yield f"{path}.attentions.{layer}", f"output_blocks.{i}.1", {}
                part = 2
            # The original's upsampler is the last part of its level's last block.
            if layer == _count(block, "resnets") - 1 and _count(block, "upsamplers"):
                yield f"{path}.upsamplers.0", f"output_blocks.{i}.{part}", {}
            i += 1


def _count(block: nn.Module, name: str) -> int:
    """How many modules the list holds; a list that the block lacks is empty."""
    children = getattr(block, name, None)
    return len(children) if isinstance(children, nn.ModuleList) else 0
