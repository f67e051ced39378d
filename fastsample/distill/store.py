"""Students on disk: a safetensors file whose metadata holds how they were made and how they are sampled."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastsample import lora
from fastsample.distill.consistency_student import ConsistencyStudent
from fastsample.distill.lcm_student import LCMStudent
from fastsample.distill.student import Facts, Student
from fastsample.lora.trainable import Trainable
from fastsample.schedule import Schedule
from fastsample.storage.reading import regular_size
from fastsample.storage.writing import replacing
from fastsample.zoo.autoencoder import Autoencoder
from fastsample.zoo.autoencoder_store import autoencoder_of, tensors_of
from fastsample.zoo.plain import plain
from fastsample.zoo.unet import UNet, UNetConfig

_KEY = "fastsample_student"
_PREFIX = "fastsample_autoencoder."  # of the names of its tensors, which none of a network's begins with
KINDS = {"ddim": Student, "consistency": ConsistencyStudent, "lcm": LCMStudent}


def save(student: Student, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a student, replacing the file at once. Of one with a lora.Trainable the LoRA alone, as diffusers reads it.

    Args:
        student: the student.
        path: of the file, by custom .safetensors.
        dtype: of the weights in it, such as torch.float16 for half the size; None as they are.

    Raises:
        OSError: it cannot be written. ValueError: there is a folder or a device. What was there stays.
    """
    network = student.network
    adapted = isinstance(network, Trainable)
    autoencoder = None if adapted else student.autoencoder
    about = {
        "output": student.output,
        "betas": student.schedule.betas.tolist(),
        "facts": asdict(student.facts),
        "unet": asdict(network.config) if isinstance(network, UNet) else None,
        "network": type(network.model if adapted else network).__name__,
        "lora": adapted,
        "autoencoder": None if autoencoder is None else asdict(autoencoder.config),
    }
    if isinstance(network, Trainable):
        lora.save(network.lora(), path, dtype=dtype, metadata={_KEY: json.dumps(about)})
        return
    tensors = {
        name: (value.to(dtype) if dtype is not None and value.is_floating_point() else value).contiguous().clone()
        for name, value in network.state_dict().items()
    }
    if clash := [name for name in tensors if name.startswith(_PREFIX)]:
        raise ValueError(f"the network must have no part of the name {clash[0]}")
    tensors |= _of_autoencoder(autoencoder, dtype)
    with replacing(path) as file:
        file.write(safetensors.torch.save(tensors, metadata={_KEY: json.dumps(about)}))


def load(path: str | Path, network: nn.Module | None = None) -> Student:
    """The student in a file, on the CPU, in float32 and in eval mode.

    Args:
        path: of the file.
        network: a module for its weights, of the class that it was distilled from; not for a UNet of the zoo, which the
            file describes. For a LoRA the teacher, of which a copy gets it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no student, or none that fits the network.
    """
    path = Path(path)
    regular_size(path, "student")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "null"))
        tensors = safetensors.torch.load_file(path)
    except Exception as error:  # a dtype that torch does not have raises what its reader trips over
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} was not made by fastsample distill: its metadata lacks {_KEY!r}")
    adapted = about.get("lora", False)
    if adapted and network is None:
        raise ValueError(f"{path} holds a LoRA for a {about.get('network')}: give such a module as network=")
    if network is None and about.get("unet") is None:
        raise ValueError(f"{path} holds the weights of a {about.get('network')}: give such a module as network=")
    try:
        schedule = Schedule.from_betas(about["betas"])
        if network is None:
            # Initial weights, soon overwritten, should not advance the caller's generator.
            with torch.random.fork_rng(devices=[]):
                network = UNet(UNetConfig(**about["unet"]), schedule)
        if adapted:
            base = plain(network) if isinstance(network, UNet) else network
            network = Trainable(base, lora={name.partition(".")[2]: value for name, value in tensors.items()})
        else:
            network.load_state_dict({name: value for name, value in tensors.items() if not name.startswith(_PREFIX)})
        facts = _facts(about["facts"])
        student = KINDS[facts.sampler](network.float(), about["output"], schedule, facts)
        student.decode_with(_autoencoder(about.get("autoencoder"), tensors))
    except (ArithmeticError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"{path} holds no such student: {type(error).__name__}: {reason}") from error
    return student.eval()


def _of_autoencoder(autoencoder: Autoencoder | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Its tensors as they are called in a student's file."""
    tensors = {} if autoencoder is None else tensors_of(autoencoder, dtype)
    return {_PREFIX + name: value for name, value in tensors.items()}


def _autoencoder(config: dict[str, Any] | None, tensors: dict[str, Tensor]) -> Autoencoder | None:
    if config is None:
        return None
    own = {name[len(_PREFIX) :]: value for name, value in tensors.items() if name.startswith(_PREFIX)}
    return autoencoder_of(config, own)


def _facts(fields: dict[str, Any]) -> Facts:
    timesteps = {int(steps): tuple(times) for steps, times in fields["timesteps"].items()}
    guidance = fields["guidance"]
    lists = {"shape": tuple(fields["shape"]), "told": tuple(fields["told"]), "timesteps": timesteps}
    return Facts(**fields | lists | {"guidance": tuple(guidance) if isinstance(guidance, list) else guidance})
