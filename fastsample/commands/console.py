"""An error of the user's is one line on stderr and exit status 2, in every subcommand."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from typing import NoReturn

from fastsample.hints import meant_names

Run = Callable[[argparse.Namespace], int]

_NUMBER = re.compile(r"-\.?\d")
# As a shell has it of a command that ended by the signal: 128 + SIGINT, 128 + SIGPIPE.
_STOPPED, _UNREAD = 130, 141


class Parser(argparse.ArgumentParser):
    """Refuses in one line, and says of an option that it does not have which one may be meant."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but that no option is left over.

        Commands have options of their own: without a command these are right, and argparse says that it is missing.
        """
        given = sys.argv[1:] if args is None else list(args)
        commands = self._commands()
        lacks_one = commands.keys().isdisjoint(given)
        theirs = {option for command in commands.values() for option in command._option_string_actions}
        for word in itertools.takewhile(lambda word: word.startswith("-") if commands else word != "--", given):
            option = word.partition("=")[0]
            if not (lacks_one and option in theirs) and self._is_unknown(option):
                self.error(f"there is no option {option}{self._meant(option)}")
        return super().parse_known_args(given, namespace)

    def _commands(self) -> dict[str, argparse.ArgumentParser]:
        """Their parsers, by name; empty where there are none."""
        found: dict[str, argparse.ArgumentParser] = {}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.update(action.choices)
        return found

    def _is_unknown(self, option: str) -> bool:
        """Whether this looks like an option, as argparse sees it, and none begins like it."""
        if not option.startswith("-") or option in ("-", "--") or " " in option or _NUMBER.match(option):
            return False
        return not any(known.startswith(option) for known in self._option_string_actions)

    def _meant(self, option: str) -> str:
        known = {one[2:].replace("-", "_"): one for one in self._option_string_actions if one.startswith("--")}
        meant = meant_names(option.lstrip("-").replace("-", "_"), known)
        return f"; did you mean {' or '.join(known[name] for name in meant)}?" if meant else ""

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
