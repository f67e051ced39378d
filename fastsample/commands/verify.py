"""The command `fastsample verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastsample.commands.console import in_one_line
from fastsample.generation import Folder, verify

HELP = "compare every chunk of a folder of fastsample generate with its checksum"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample verify`."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="of fastsample generate")
    parser.add_argument("--rebuild", action="store_true", help="write the manifest anew from the chunks")


@in_one_line("verify")
def run(args: argparse.Namespace) -> int:
    """Says what is there.

    Returns:
        0 where the set is whole; 2 where it is not or on bad input, and 130 on Ctrl-C, with a word on stderr.
    """
    if args.rebuild:
        Folder.open(args.folder).rebuild()
    report = verify(args.folder)
    if not report.complete:
        raise ValueError(
            f"{args.folder}: of {report.chunks} chunks {report.damaged} are damaged, {report.missing} missing and "
            f"{report.doubled} doubled"
            + ("; the manifest does not list them: --rebuild writes it" if report.whole == report.chunks else "")
        )
    print(f"{args.folder}: {report.chunks} chunks, all whole")
    return 0
