"""The command line: `fastsample COMMAND`, with the commands of fastsample/commands."""

from __future__ import annotations

from collections.abc import Sequence

import fastsample
from fastsample.commands import (
    autoencoder,
    demo,
    distill,
    evaluate,
    finetune,
    generate,
    info,
    merge,
    nll,
    sample,
    selftest,
    train,
    verify,
)
from fastsample.commands.console import Parser

COMMANDS = {
    "autoencoder": autoencoder,
    "demo": demo,
    "distill": distill,
    "evaluate": evaluate,
    "finetune": finetune,
    "generate": generate,
    "info": info,
    "merge": merge,
    "nll": nll,
    "sample": sample,
    "selftest": selftest,
    "train": train,
    "verify": verify,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status."""
    parser = Parser(prog="fastsample", description="Fast sampling from diffusion models.")
    parser.add_argument("--version", action="version", version=f"fastsample {fastsample.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
