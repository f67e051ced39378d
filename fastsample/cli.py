"""The command line: `fastsample demo`, `fastsample selftest`, `fastsample train`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import fastsample
from fastsample.commands import Parser, demo, in_one_line, train


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status."""
    parser = Parser(prog="fastsample", description="Fast sampling from diffusion models.")
    parser.add_argument("--version", action="version", version=f"fastsample {fastsample.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    show = commands.add_parser("demo", help="sample digits from the bundled model and time it")
    show.add_argument("--out", type=Path, default=Path("samples.png"), help="the picture to write (%(default)s)")
    show.add_argument("--seed", type=int, default=0, help="noise seed (%(default)s)")
    show.add_argument("--rounds", type=int, default=5, help="timing rounds, the median counts (%(default)s)")
    show.set_defaults(run=demo.run)

    check = commands.add_parser("selftest", help="check every op on every backend that is here: run it first on a GPU")
    check.add_argument("--device", help="cpu, cuda or cuda:N; default cuda where torch sees one")
    check.add_argument("--backend", help="this one alone (and the first one here, for the bits)")
    check.add_argument("--quick", action="store_true", help="small shapes only")
    check.set_defaults(run=_selftest)

    fit = commands.add_parser("train", help="train a small U-Net as the bundled model was trained")
    train.add_arguments(fit)
    fit.set_defaults(run=train.run)

    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


@in_one_line("selftest")
def _selftest(arguments: argparse.Namespace) -> int:
    from fastsample import selftest  # it builds tables, which no other command needs

    return selftest.run(arguments)
