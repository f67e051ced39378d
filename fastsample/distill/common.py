"""What all distillations take, and how a run of one begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import TypedDict, Unpack

from fastsample.checks import integer, usable_device
from fastsample.distill.method import Method
from fastsample.distill.network import network_for
from fastsample.distill.run import distill
from fastsample.distill.settings import Settings
from fastsample.distill.student import Facts, Student
from fastsample.distill.teacher import Teacher
from fastsample.model import Model, Predictor
from fastsample.schedule import Schedule
from fastsample.train.processes import Processes
from fastsample.zoo.autoencoder import Autoencoder


class Common(TypedDict, total=False):
    """What every function of fastsample.distill takes beside its own arguments.

    Attributes:
        schedule, prediction: the teacher's; default as for fastsample.ddim.
        cond: the teacher's keywords for N examples, of which batches are drawn: a tensor has an example per entry of
            its first axis, such as {"y": torch.arange(10)} for ten classes or the embeddings of some thousand prompts.
        uncond: the same keywords for no condition, one entry or N. Only with guidance.
        guidance: the weight w of classifier-free guidance of the teacher, which the student folds in: it gives guided
            samples in one call a step. Default 1, none. For `trajectory` and `lcm` it may be (least, most), and for
            `guided` it must: one student for all weights between, whose network is told w as its keyword `guidance`.
        clip: what the teacher's x0 is clipped to, such as 1.0 for images in [-1, 1]; default None.
        student: a module of which a copy is trained, instead of one of the teacher: a smaller one, or the teacher with
            an adapter of PEFT's whose parameters alone require gradients. It is trained in float32.
        output: what that gives, see distill.Student.
        autoencoder: of a teacher of latents: images that are given as data are encoded by it, and what the student
            samples is decoded. It is kept in the student's file, but for a LoRA's.
        settings: a distill.Settings.
        device: where to compute; default where the teacher is. A teacher that is a module is moved there.
        save_every: iterations between checkpoints; default 200.
        progress: show tqdm bars; default True.
    """

    schedule: Schedule | None
    prediction: str | None
    cond: Mapping[str, Any] | None
    uncond: Mapping[str, Any] | None
    guidance: float | tuple[float, float]
    clip: float | None
    student: nn.Module | None
    output: str | None
    autoencoder: Autoencoder | None
    settings: Settings | None
    device: torch.device | str | None
    save_every: int
    progress: bool


def run(
    model: Model,
    shape: Sequence[int],
    out: str | Path,
    make: Callable[[Teacher, Student, Settings], Method],
    defaults: Settings,
    kind: type[Student] = Student,
    told: Sequence[str] = (),
    both: bool = True,
    **common: Unpack[Common],
) -> Student:
    """Makes teacher, student and method of these arguments, and runs it.

    Args:
        model, shape: the teacher, and the shape of one sample.
        out: the folder.
        make: the method, of a student whose facts are not known yet.
        defaults: the settings where none are given.
        kind: the class of the student.
        told: what its network is told beside the conditions.
        both: see network_for.
        **common: see Common.
    """
    if unknown := common.keys() - Common.__annotations__.keys():
        raise TypeError(f"there is no argument {min(unknown)}: see fastsample.distill.Common")
    autoencoder = common.get("autoencoder")
    if not isinstance(autoencoder, Autoencoder | None):
        raise TypeError(f"autoencoder must be a fastsample.zoo.Autoencoder, got {type(autoencoder).__name__}")
    settings = common.get("settings") or defaults
    if not isinstance(settings, Settings):
        raise TypeError(f"settings must be a fastsample.distill.Settings, got {type(settings).__name__}")
    save_every = integer("save_every", common.get("save_every", 200), 1)
    own = Predictor(model).device or torch.device("cpu")
    processes = Processes(usable_device(common.get("device") or own))
    if isinstance(model, nn.Module):
        model.to(processes.device)
    names = ("schedule", "prediction", "cond", "uncond", "guidance", "clip")
    given = {name: common[name] for name in names if name in common}  # type: ignore[literal-required]
    teacher = Teacher(model, shape, device=processes.device, **given)
    teacher.probe()
    network, output = network_for(teacher, common.get("student"), common.get("output"), told, both)
    student = kind(network, output, teacher.schedule, Facts("", tuple(teacher.shape), {}))
    student.decode_with(autoencoder)
    return distill(
        make(teacher, student, settings),
        student,
        out,
        settings,
        processes,
        save_every=save_every,
        progress=common.get("progress", True),
    )
