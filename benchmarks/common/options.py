"""The command line that all benchmarks share, and the refusal to measure something else than what was named."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import torch

import fastsample
from benchmarks.common import cpu, gpu
from benchmarks.common.harness import Clock, wall
from benchmarks.common.progress import warn_of_load
from fastsample.ops.backend import cpu_module

_cpu = cpu_module()

Shape = tuple[int, ...]

CPU = torch.device("cpu")

SHAPES: tuple[Shape, ...] = ((1, 16, 7), (1, 4, 64, 64), (8, 4, 64, 64), (8, 3, 256, 256), (16, 3, 512, 512))
QUICK_SHAPES: tuple[Shape, ...] = ((1, 16, 7), (1, 4, 64, 64))
ROUNDS, QUICK_ROUNDS, FEWEST_ROUNDS = 40, 5, 30


@dataclass(frozen=True)
class Run:
    """What to measure, and where results go.

    Attributes:
        shapes, rounds: as asked for.
        quick: a smoke run; its files are named so that they never replace measured ones.
        out: the folder of the results.
        device: where the tensors lie; results are named after the GPU, or the CPU's family.
    """

    shapes: tuple[Shape, ...]
    rounds: int
    quick: bool
    out: Path
    device: torch.device = CPU

    def path(self, name: str, suffix: str) -> Path:
        """The result file of this name."""
        where = cpu.slug(cpu.family()) if self.device.type == "cpu" else gpu.slug(self.device)
        return self.out / f"{name}-{where}{'-quick' if self.quick else ''}{suffix}"

    @cached_property
    def clock(self) -> Clock:
        """For single kernels."""
        return wall if self.device.type == "cpu" else gpu.events(self.device)

    @cached_property
    def loop_clock(self) -> Clock:
        """For whole runs, of which the host's work is a part."""
        return wall if self.device.type == "cpu" else gpu.synchronised(self.device)


def parser(module: str, description: str | None, *, gpus: bool = False) -> ArgumentParser:
    """A parser with the shared flags, --device where the script can measure on GPUs; a script adds its own."""
    flags = ArgumentParser(f"python -m {module}", description=description, formatter_class=RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, help=f"rounds of each comparison, default {ROUNDS}")
    flags.add_argument("--shapes", type=_shapes, help="comma separated, as in 1x16x7,8x4x64x64")
    flags.add_argument("--quick", action="store_true", help=f"small shapes, {QUICK_ROUNDS} rounds: a smoke run")
    flags.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder of the results")
    flags.add_argument("--threads", type=int, help="torch's threads, which are fastsample's too")
    if gpus:
        flags.add_argument("--device", type=_device, default=CPU, help="cpu, cuda or cuda:N (%(default)s)")
    flags.add_argument("--isa", help="the instruction set of the CPU kernels")
    return flags


def begin(arguments: Namespace, backend: str = "cpu") -> Run:
    """Applies the shared flags. Exits with status 2 and the reason where they, or the backend, cannot be had."""
    device: torch.device = getattr(arguments, "device", CPU)
    if device.type == "cpu":
        require_backend(backend)
    else:
        require_gpu(device)
    warn_of_load()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.isa is not None:
        try:
            _cpu.set_isa(arguments.isa)
        except ValueError as error:
            refuse(f"--isa: {error}")
    quick = arguments.quick
    rounds = arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    if rounds < FEWEST_ROUNDS and not quick:
        refuse(f"--rounds {rounds} says nothing: at least {FEWEST_ROUNDS}, or --quick")
    return Run(arguments.shapes or (QUICK_SHAPES if quick else SHAPES), rounds, quick, arguments.out, device)


def require_backend(name: str) -> None:
    """Exits with status 2 unless this backend is there and is the one that will run."""
    status = fastsample.backends()[name]
    if not status["available"]:
        refuse(f"this benchmark measures backend {name!r}, which cannot run here: {status['reason']}")
    forced = os.environ.get("FASTSAMPLE_BACKEND")
    if forced and forced != name:
        refuse(f"this benchmark measures backend {name!r}, but FASTSAMPLE_BACKEND is {forced!r}: unset it")


def require_gpu(device: torch.device) -> None:
    """Exits with status 2 unless this GPU is there, with kernels that will run on it."""
    reason = gpu.refusal(device) if device.type == "cuda" else "it is neither a CPU nor a GPU of CUDA or ROCm"
    if reason:
        refuse(f"--device {device}: {reason}")
    forced = os.environ.get("FASTSAMPLE_BACKEND")
    if forced and forced not in ("cuda", "triton"):
        refuse(f"--device {device} measures the cuda and triton backends, but FASTSAMPLE_BACKEND is {forced!r}")


def refuse(reason: str) -> NoReturn:
    """Ends the program with status 2."""
    print(f"refused: {reason}", file=sys.stderr)
    raise SystemExit(2)


def label(shape: Sequence[int]) -> str:
    """(8, 4, 64, 64) as 8x4x64x64."""
    return "x".join(map(str, shape))


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise ValueError from error


def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = tuple(tuple(int(size) for size in shape_text.split("x")) for shape_text in text.split(","))
    if any(size < 1 for shape in shapes for size in shape):
        raise ValueError
    return shapes
