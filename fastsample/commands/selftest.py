"""The command `fastsample selftest`."""

from __future__ import annotations

import argparse

from fastsample.commands.console import in_one_line

HELP = "check every op on every backend that is here: run it first on a GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample selftest`."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default cuda where torch sees one")
    parser.add_argument("--backend", help="this one alone (and the first one here, for the bits)")
    parser.add_argument("--quick", action="store_true", help="small shapes only")


@in_one_line("selftest")
def run(args: argparse.Namespace) -> int:
    """Prints the table of all checks.

    Returns:
        0 where every check passed, 1 where one failed, 2 where there is no such device or backend.
    """
    from fastsample import selftest  # it builds tables, which no other command needs

    return selftest.run(args.device, args.backend, args.quick)
