"""The command `fastsample merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastsample.commands.console import in_one_line
from fastsample.generation import merge

HELP = "make one .npz file of a folder of fastsample generate, as tools for FID read it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastsample merge`."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="of fastsample generate")
    parser.add_argument("out", metavar="FILE.npz", type=Path, help="arr_0 uint8 (N, H, W, C) and arr_1, the classes")


@in_one_line("merge")
def run(args: argparse.Namespace) -> int:
    """Merges.

    Returns:
        0 on success; 2 on bad input and 130 on Ctrl-C, with a word on stderr.
    """
    print(f"{merge(args.folder, args.out):,} samples in {args.out}")
    return 0
