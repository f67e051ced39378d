"""The command `fastsample info`: what is installed here and what runs here, or what a model is."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from textwrap import wrap

import torch

import fastsample
from fastsample import zoo
from fastsample.commands.about import Lines, about
from fastsample.commands.console import in_one_line
from fastsample.commands.machine import cpu_name, cpus, load, load_text
from fastsample.generation import FORMS
from fastsample.ops.available import backends

_COLUMNS = 100
HELP = "say what is installed and what runs here, or what a model is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the argument of `fastsample info`."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{FORMS}; or a file or folder of a run")


@in_one_line("info")
def run(args: argparse.Namespace) -> int:
    """Prints a line for each thing.

    Returns:
        0 on success; 2 where there is no such model, with a word on stderr.
    """
    print(aligned(here() if args.model is None else about(args.model)))
    return 0


def here() -> Lines:
    """(what, of which value) of this installation and machine."""
    known = backends()
    cpu = known["cpu"]
    lines = [
        ("fastsample", fastsample.__version__),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("python", platform.python_version()),
        ("cpu", f"{cpu_name()}, {cpus()} CPUs, load {load_text(load())}"),
    ]
    if cpu["available"]:
        lines.append(("level", f"{cpu['isa']} of {', '.join(cpu['isas'])}; threads by {cpu['threads']}"))
        lines.append(("", f"no AMX: {cpu['amx']}" if cpu["amx"] else "with AMX for LoRA"))
    for place, (name, status) in enumerate(known.items()):
        can = "yes" if status["available"] else f"no: {status['reason']}"
        lines.append(("" if place else "backends", f"{name}: {can}"))
    return [*lines, ("gpu", _gpus()), ("triton", _triton()), *_models()]


def aligned(lines: Lines) -> str:
    """The values below each other, long ones in several lines."""
    width = max(len(name) for name, _ in lines) + 2
    wrapped = [
        (name if place == 0 else "", part)
        for name, value in lines
        for place, part in enumerate(wrap(value, _COLUMNS, break_on_hyphens=False, break_long_words=False) or [""])
    ]
    return "\n".join(f"{name:<{width}}{part}".rstrip() for name, part in wrapped)


def _gpus() -> str:
    built = torch.version.cuda or torch.version.hip
    if built is None:
        return "none: this torch was built for CPUs"
    if not torch.cuda.is_available():
        return f"none that torch finds, which was built for {built}"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; torch was built for {built}"


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def _models() -> Lines:
    missing = [name for name, path in zoo.FILES.items() if not path.is_file()]
    lines = [
        ("models", str(next(iter(zoo.FILES.values())).parent)),
        ("", ", ".join(f"zoo:{name}" for name in zoo.FILES)),
    ]
    return [*lines, ("", f"missing: {', '.join(missing)} (reinstall fastsample)")] if missing else lines
