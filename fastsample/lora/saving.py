"""LoRA files as diffusers and PEFT read them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fastsample.checks import one_of
from fastsample.storage.writing import check_replaceable, replace_text, replacing

FORMATS = ("diffusers", "peft")
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def save(
    lora: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    format: str = "diffusers",
    component: str = "unet",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a LoRA: X.lora_A.weight, X.lora_B.weight and perhaps X.alpha of each layer X, as state_dict gives it.

    alpha / r goes into B, so that no reader needs an alpha: where it is left out, all take alpha = r.

    Args:
        lora: see above.
        path: a .safetensors file for "diffusers", a folder for "peft".
        format: "diffusers" is what load_lora_weights reads, COMPONENT.X.lora_A.weight; "peft" a folder with
            adapter_config.json and adapter_model.safetensors for PeftModel.from_pretrained. `attach` reads both.
        component: of a pipeline, in diffusers' files: "unet" or "transformer".
        dtype: of the factors in the file, such as torch.float16; None as they are.
        metadata: texts for the file's header. Those of several have no order: equal LoRAs may have unequal bytes then.

    Raises:
        ValueError: other keys, another format, layers of more than one rank, or there is something else at path.
            OSError: it cannot be written. What was there stays.
    """
    one_of("format", format, FORMATS)
    pairs = {key[: -len(_DOWN)]: (down, lora[_up(key, lora)]) for key, down in lora.items() if key.endswith(_DOWN)}
    known = {stem + end for stem in pairs for end in (_DOWN, _UP, ".alpha")}
    if not pairs or (foreign := sorted(lora.keys() - known)):
        raise ValueError(
            f"lora must hold X{_DOWN}, X{_UP} and X.alpha of layers X, got {foreign[0] if pairs else 'none'}"
        )
    ranks = sorted({len(down) for down, _ in pairs.values()})
    if len(ranks) > 1:  # readers that find no alpha may take one for all
        raise ValueError(f"lora must have layers of one rank, got ranks {', '.join(map(str, ranks))}")
    prefix = f"{component}." if format == "diffusers" else "base_model.model."
    tensors = {}
    for stem, (down, up) in pairs.items():
        alpha = lora.get(f"{stem}.alpha")
        factor = 1.0 if alpha is None else float(alpha) / len(down)
        for end, tensor in ((_DOWN, down), (_UP, folded(up, factor))):
            tensors[prefix + stem + end] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous().clone()
    path, config = Path(path), None
    if format == "peft":
        path, config = path / PEFT_FILES[1], path / PEFT_FILES[0]
        check_replaceable(config)
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(safetensors.torch.save(tensors, metadata=dict(metadata or {"format": "pt"})))
    if config is not None:
        replace_text(config, json.dumps(_config(pairs), indent=1) + "\n")


def folded(up: Tensor, factor: float) -> Tensor:
    """factor * B, in its own dtype where that is exact, else in float32 at least."""
    if factor == 1:
        return up
    wide = up.to(torch.float64 if up.dtype == torch.float64 else torch.float32) * factor
    narrow = wide.to(up.dtype)
    return narrow if torch.equal(narrow.to(wide.dtype), wide) else wide


def _up(key: str, lora: Mapping[str, Tensor]) -> str:
    up = key[: -len(_DOWN)] + _UP
    if up not in lora:
        raise ValueError(f"lora has {key} without {up}")
    return up


def _config(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, object]:
    """What PEFT wants to be told."""
    [rank] = {len(down) for down, _ in pairs.values()}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(pairs),
    }
