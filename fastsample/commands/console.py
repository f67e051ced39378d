"""An error of the user's is one line on stderr and exit status 2, in every subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import NoReturn

Run = Callable[[argparse.Namespace], int]

# As a shell has it of a command that ended by the signal: 128 + SIGINT, 128 + SIGPIPE.
_STOPPED, _UNREAD = 130, 141


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


def in_one_line(name: str, stopped: str = "stopped") -> Callable[[Run], Run]:
    """Decorates the run of a subcommand: what it raises becomes one line on stderr and an exit status.

    Args:
        name: of the subcommand.
        stopped: what to say on Ctrl-C.
    """

    def decorate(run: Run) -> Run:
        @wraps(run)
        def caught(arguments: argparse.Namespace) -> int:
            try:
                status = run(arguments)
                sys.stdout.flush()
                return status
            except BrokenPipeError:  # `| head`, say, has read enough
                _forget_output()
                return _UNREAD
            except KeyboardInterrupt:
                print(f"fastsample {name}: {stopped}", file=sys.stderr)
                return _STOPPED
            except (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
                print(f"fastsample {name}: {one_line(error) or type(error).__name__}", file=sys.stderr)
            try:
                sys.stdout.flush()
            except OSError:
                _forget_output()
            return 2

        return caught

    return decorate


def one_line(text: object) -> str:
    """The text with its first lines joined, at most 1000 letters."""
    joined = " ".join(str(text).split())
    return joined if len(joined) <= 1000 else f"{joined[:1000]} ..."


def _forget_output() -> None:
    """Drops unwritten output, which Python would try to write once more at its end, and complain."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
