"""accelerate and restore: a whole pipeline, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn

from fastsample.integrations.acceleration.component import (
    accelerate_component,
    check_restorable,
    record_of,
    restore_component,
)
from fastsample.integrations.acceleration.peft import peft_layers
from fastsample.integrations.acceleration.report import ComponentReport, Report

# Where a scheduler that accelerate has made keeps the one in whose place it stands.
_ORIGINAL = "_accelerated_from"
_ONCE = "it runs once an image, and diffusers scales its LoRA through PEFT's layers"


def accelerate(pipeline: Any) -> Report:
    """Puts a pipeline of diffusers on this package's kernels, in place: scheduler, attention projections, LoRAs.

    - The scheduler gives way to the drop-in class of the same name, with the same options and state.
    - In every network but text encoders and autoencoders q, k and v become one product: Y = X (W_q, W_k, W_v)^T.
    - LoRAs that PEFT has loaded there move into these layers: W + sum_a weight_a * alpha_a / r_a * B_a A_a.

    The weights stay where they are, with packed copies beside them. What cannot be done is left and reported:
    schedulers without a counterpart, attention processors that are not diffusers', networks that are compiled,
    quantized or offloaded, fused LoRAs, DoRA. A second call changes only what is new.
    load_lora_weights, set_adapters and diffusers' other methods for LoRA go on working, and so does the keyword scale.

    Args:
        pipeline: a DiffusionPipeline.

    Returns:
        What was done and what was left, and why; it prints as a sentence a line.

    Raises:
        TypeError: for anything but a pipeline. Whatever else is raised half way, the pipeline is as before; a network
            that a second call was about to do anew is as restore leaves it.
    """
    _check(pipeline)
    with ExitStack() as undo:
        components = []
        for name, module in _networks(pipeline):
            if not _runs_every_step(module):
                if paths := tuple(peft_layers(module)):
                    components.append(ComponentReport(name, left={f"LoRA: {_ONCE}": paths}))
                continue
            before = record_of(module)
            components.append(accelerate_component(name, module))
            if record_of(module) is not before:
                undo.callback(restore_component, module)
        swapped, scheduler = _swap(pipeline, undo)
        undo.pop_all()
    return Report(swapped, scheduler, tuple(components))


def restore(pipeline: Any) -> None:
    """Takes back what accelerate did: the same modules, PEFT's layers and scheduler object, and so the same bits.

    A scheduler that was set after accelerate stays, and so does a network. Without accelerate nothing happens.

    Args:
        pipeline: a DiffusionPipeline, or another one that shares its networks.

    Raises:
        TypeError: for anything but a pipeline. RuntimeError: where lora.attach has added adapters to a network after
            accelerate. Nothing has changed then.
    """
    _check(pipeline)
    networks = list(_networks(pipeline))
    for name, module in networks:
        check_restorable(name, module)
    for _, module in networks:
        restore_component(module)
    original = _original(getattr(pipeline, "scheduler", None))
    if original is not None:
        pipeline.scheduler = original


def _check(pipeline: object) -> None:
    # A pipeline can only be there where diffusers is imported.
    diffusers: Any = sys.modules.get("diffusers.pipelines.pipeline_utils")
    if diffusers is None or not isinstance(pipeline, diffusers.DiffusionPipeline):
        raise TypeError(f"pipeline must be a DiffusionPipeline of diffusers, got {type(pipeline).__name__}")


def _networks(pipeline: Any) -> Iterator[tuple[str, nn.Module]]:
    seen = set[nn.Module]()
    for name in pipeline.config:
        # Of what is no component, diffusers warns where an attribute is asked for.
        module = vars(pipeline).get(name)
        if isinstance(module, nn.Module) and module not in seen:
            seen.add(module)
            yield name, module


def _runs_every_step(module: nn.Module) -> bool:
    """Whether a network is none of transformers', which encode what is given, and no autoencoder."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    network = module._modules.get("_orig_mod") or module
    encodes = transformers is not None and isinstance(network, transformers.PreTrainedModel)
    return not encodes and not hasattr(network, "decode")


def _swap(pipeline: Any, undo: ExitStack) -> tuple[bool, str]:
    scheduler = getattr(pipeline, "scheduler", None)
    name = type(scheduler).__name__
    if scheduler is None:
        return False, "the pipeline has none"
    if _original(scheduler) is not None:
        return True, f"{name} of fastsample in the place of diffusers'"
    if type(scheduler).__module__.startswith("fastsample."):
        return False, f"{name} is fastsample's already"
    # Its classes derive from diffusers', which not everybody has.
    from fastsample.integrations.diffusers import same_as

    try:
        ours = same_as(scheduler)
    except ValueError as error:
        return False, f"left: {name}: {error}"
    if ours is None:
        return False, f"left: fastsample has no {name}"
    vars(ours)[_ORIGINAL] = scheduler
    undo.callback(setattr, pipeline, "scheduler", scheduler)
    pipeline.scheduler = ours
    return True, f"{name} of fastsample in the place of diffusers'"


def _original(scheduler: object) -> Any:
    return getattr(scheduler, "__dict__", {}).get(_ORIGINAL)
