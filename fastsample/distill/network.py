"""The network that a student begins as: a copy of its teacher that gives something sound at its first timestep."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastsample.checks import one_of
from fastsample.distill.student import OUTPUTS, Facts, Student
from fastsample.distill.teacher import Teacher
from fastsample.lora.layers.adapted import Adaptable
from fastsample.lora.trainable import Trainable
from fastsample.model import attribute
from fastsample.train.losses import PREDICTIONS
from fastsample.zoo.plain import plain
from fastsample.zoo.unet import UNet


def network_for(
    teacher: Teacher, student: nn.Module | None, output: str | None, told: Sequence[str] = (), both: bool = True
) -> tuple[nn.Module, str]:
    """(network, what it gives) that a student of this teacher begins as, in eval mode: without dropout.

    A copy gives what the teacher predicts; where that is epsilon with a variance half, "both", the variance half
    becoming x0.

    Args:
        teacher: the teacher.
        student: a module that is copied instead, with its choice of parameters to train; it may be smaller.
        output: what that gives, see distill.Student; None is found out: what the student states as its `prediction`,
            or else what the teacher predicts, and "both" where that is epsilon and there are two halves of channels.
        both: whether a copy of a network of two halves may become one of both.
        told: keywords that it is told, a number per sample. A UNet of the zoo learns them, others must know them.

    Raises:
        ValueError: the teacher is no module to copy, or the network does not fit the teacher's samples.
    """
    if output is not None:
        one_of("output", output, OUTPUTS)
    if isinstance(student, Student):
        output = output or student.output
        student = student.network
    network: Any = _copied(teacher, student).float().to(teacher.device).eval()
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError("student= has no parameters that require gradients: there is nothing to train")
    if isinstance(network, UNet):
        network.tell(*(name for name in told if name not in network.config.told))
    given, wanted = _probe(network, teacher, told), teacher.shape
    if given.shape[2:] != wanted[1:] or given.shape[1] not in (wanted[0], 2 * wanted[0]):
        raise ValueError(
            f"the student returns {tuple(given.shape[1:])} for samples of the teacher's shape {tuple(wanted)}: it must "
            "return that, or twice the channels"
        )
    halves = given.shape[1] // wanted[0]
    if output is None:
        stated = None if student is None else attribute(network, "prediction", str)
        own = one_of("the student's prediction", stated or teacher.prediction, PREDICTIONS)
        output = "both" if both and halves == 2 and own == "epsilon" else own
    if output == "both" and halves == 1:
        raise ValueError("output='both' needs a student that returns twice the channels, [epsilon, x0]")
    if output == "both" and student is None:
        _silence_second_half(network, teacher, given, told)
    return network, output


def untrained(teacher: UNet, widths: Sequence[int], seed: int) -> UNet:
    """A network of v for the samples of this one, with other widths and random weights."""
    config = replace(teacher.config, widths=tuple(widths), prediction="v", target="v", learned_variance=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(config, teacher.schedule)


def _copied(teacher: Teacher, student: nn.Module | None) -> nn.Module:
    """A copy of the student, or of the teacher with all its weights to be trained."""
    given: Any = teacher.model if student is None else student
    given = getattr(given, "_orig_mod", given)  # what torch.compile has wrapped
    if not isinstance(given, nn.Module):
        if student is not None:
            raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
        raise ValueError("the teacher is no torch module that a student could be copied from: give student=")
    adapted = any(isinstance(module, Adaptable) for module in given.modules())
    if adapted and (student is None or not isinstance(given, Trainable)):
        raise ValueError(
            "a model with adapters of fastsample.lora is not trained as a whole: detach them, or give "
            "student=lora.Trainable(...)"
        )
    if student is None:
        return copy.deepcopy(given).requires_grad_(True)
    return plain(given) if isinstance(given, UNet) else copy.deepcopy(given)


def _probe(network: nn.Module, teacher: Teacher, told: Sequence[str]) -> Tensor:
    """What the network gives for one sample."""
    device = teacher.device
    x, t = torch.zeros(1, *teacher.shape, device=device), torch.full((1,), teacher.start("epsilon"), device=device)
    numbers = {name: torch.ones(1, device=device) for name in told}
    # As a student calls it; its channels are looked at afterwards.
    student = Student(network, "epsilon", teacher.schedule, Facts("", tuple(teacher.shape), {}))
    try:
        with torch.no_grad():
            given = student.given(x, t, **teacher.told(torch.zeros(1, dtype=torch.int64)), **numbers)
    except TypeError as error:
        if told:
            raise ValueError(f"the student must take the keywords {', '.join(told)}: {error}") from error
        raise
    if not isinstance(given, Tensor) or given.ndim != x.ndim:
        shape = getattr(given, "shape", type(given).__name__)
        raise ValueError(f"the student must return a tensor of {x.ndim} axes, got {shape}")
    return given


def _silence_second_half(network: nn.Module, teacher: Teacher, before: Tensor, told: Sequence[str]) -> None:
    """Makes the variance half 0, by the rows of the last layer that make it, so that x0 begins as nothing.

    The last layer is found by its width. Where the half does not come out as 0 then, all stays as it was: training
    overwrites a half that means something else too, only later.
    """
    channels = before.shape[1] // 2
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    fitting = [layer for layer in layers if layer.weight.shape[0] % (2 * channels) == 0]
    if not fitting:
        return
    last = fitting[-1]
    kept = {name: value.detach().clone() for name, value in last.named_parameters()}
    half = last.weight.shape[0] // 2
    with torch.no_grad():
        for parameter in last.parameters():
            parameter[half:].zero_()
        after = _probe(network, teacher, told)
        if after[:, channels:].any() or not torch.equal(after[:, :channels], before[:, :channels]):
            for name, parameter in last.named_parameters():
                parameter.copy_(kept[name])
