"""PEFT's patterns for modules' paths, matched in bounded time whatever a file holds.

Python's `re` tries one way after another, of which `(a+)+b` has twice as many for every further letter. Here all places
that a part of the pattern may have reached are the bits of one number, so that every way is tried at once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

try:  # what re itself parses with; it has no public name
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as sre_parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as sre
    import sre_parse as sre_parser

_MOST, _LONGEST, _DEEPEST = 8192, 1000, 20
# Some ten seconds; 1,000 modules and 20 patterns with three `.*` each take a tenth of that.
_STEPS = 20_000_000
_CATEGORIES = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_WORD: lambda letter: letter.isalnum() or letter == "_",
    sre.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    sre.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    sre.CATEGORY_NOT_WORD: lambda letter: not (letter.isalnum() or letter == "_"),
}
_LETTERS = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN)


class Patterns:
    """Values by pattern: the one whose pattern is the first to match the whole path, or its end from a dot on.

    Raises:
        ValueError: for what is no regular expression, more of one than is bounded here (back references, groups with
            options, looking behind), and more patterns or longer ones than models have modules and names.

    Example:
        >>> patterns = Patterns({"q": 4, "layers[.][0-3][.].*": 8})
        >>> [patterns.value(path) for path in ("a.q", "layers.2.k", "layers.4.k")]
        [4, 8, None]
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        if len(values) > _MOST:
            raise ValueError(f"holds {len(values)} patterns, at most {_MOST} are read")
        self._values = [(text, _Plain(text) or _parsed(text), value) for text, value in values.items()]
        self._left = _STEPS

    def value(self, path: str) -> Any:
        """The value for the module at this path, None where no pattern matches.

        Raises:
            ValueError: where matching would take too long.
        """
        for text, matcher, value in self._values:
            if isinstance(matcher, _Plain):
                if matcher.matches(path):
                    return value
                continue
            run = _Run(path, self._left)
            matched = run.whole(matcher)
            self._left = run.left
            if self._left < 0:
                raise ValueError(f"holds {text!r}, which takes too long to match")
            if matched:
                return value
        return None


class _Plain:
    """A pattern of plain letters, as most are, which `re` matches without trials; false where the text is no such."""

    def __init__(self, text: str) -> None:
        self._match = re.compile(rf"(?:.*\.)?{text}$").match if re.fullmatch(r"[\w.-]+", text) else None

    def __bool__(self) -> bool:
        return self._match is not None

    def matches(self, path: str) -> bool:
        assert self._match is not None
        return self._match(path) is not None


def _parsed(text: str) -> Any:
    if len(text) > _LONGEST:
        raise ValueError(f"holds a pattern of {len(text)} letters, at most {_LONGEST} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = sre_parser.parse(text)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise ValueError(f"holds {text!r}, no regular expression: {error}") from None
    options = tree.state.flags & ~sre.SRE_FLAG_UNICODE
    if options or (reason := _unknown(tree, _DEEPEST)):
        raise ValueError(f"holds {text!r}, a regular expression with {'options' if options else reason}")
    return tree


def _unknown(tree: Any, depth: int) -> str | None:
    """The name of the first part of a pattern that _Run cannot match, None where it can match all."""
    if depth == 0:
        return f"more than {_DEEPEST} levels of groups"
    for kind, argument in tree:
        inner: Iterable[Any] = ()
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            inner = [argument[2]]
        elif kind is sre.BRANCH:
            inner = argument[1]
        elif kind is sre.SUBPATTERN and not argument[1] and not argument[2]:
            inner = [argument[3]]
        elif kind in (sre.ASSERT, sre.ASSERT_NOT) and argument[0] > 0:
            inner = [argument[1]]
        elif kind not in (*_LETTERS, sre.AT):
            return str(kind).lower()
        for part in inner:
            if unknown := _unknown(part, depth - 1):
                return unknown
    return None


class _Run:
    """Matches patterns on one path. A set of places in it is a number, whose bit n is the place after letter n."""

    def __init__(self, path: str, left: int) -> None:
        self._path, self.left = path, left
        self._end = 1 << len(path)
        self._letters: dict[str, int] = {}
        for i, letter in enumerate(path):
            self._letters[letter] = self._letters.get(letter, 0) | 1 << i

    def whole(self, tree: Any) -> bool:
        """Whether re.match(rf"(.*\\.)?({pattern})$", path) would match."""
        first_line = self._path.partition("\n")[0]
        starts = 1 | sum(2 << i for i, letter in enumerate(first_line) if letter == ".")
        return bool(self._after(tree, starts) & self._at(sre.AT_END))

    def _after(self, tree: Any, places: int) -> int:
        """The places where a part of the pattern may end if it begins at one of these places."""
        for kind, argument in tree:
            self.left -= 1
            if not places or self.left < 0:
                return 0
            if kind in _LETTERS:
                places = (places & self._of(kind, argument)) << 1
            elif kind is sre.AT:
                places &= self._at(argument)
            elif kind is sre.SUBPATTERN:
                places = self._after(argument[3], places)
            elif kind is sre.BRANCH:
                ends = 0
                for branch in argument[1]:
                    ends |= self._after(branch, places)
                places = ends
            elif kind in (sre.ASSERT, sre.ASSERT_NOT):
                places = self._ahead(argument[1], places, kind is sre.ASSERT)
            else:
                places = self._repeated(argument, places)
        return places

    def _repeated(self, argument: tuple[int, int, Any], places: int) -> int:
        least, most, tree = argument
        for _ in range(least):
            after = self._after(tree, places)
            if after == places:
                break
            places = after
        seen = places
        # New places are one fewer every time: there are no more rounds than letters.
        for _ in range(min(most - least, len(self._path) + 1)):
            places = self._after(tree, places) & ~seen
            if not places:
                break
            seen |= places
        return seen

    def _ahead(self, tree: Any, places: int, wanted: bool) -> int:
        kept = 0
        for i in range(len(self._path) + 1):
            if places >> i & 1 and bool(self._after(tree, 1 << i)) == wanted:
                kept |= 1 << i
        return kept

    def _at(self, where: Any) -> int:
        if where in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            return 1
        if where is sre.AT_END_STRING:
            return self._end
        if where is sre.AT_END:
            return self._end | (self._end >> 1 if self._path.endswith("\n") else 0)
        boundary = sum(1 << match.start() for match in re.finditer(r"\b", self._path))
        return boundary if where is sre.AT_BOUNDARY else (2 * self._end - 1) & ~boundary

    def _of(self, kind: Any, argument: Any) -> int:
        """The places before the letters that a part of the pattern takes."""
        if kind is sre.LITERAL:
            return self._letters.get(chr(argument), 0)
        return sum(places for letter, places in self._letters.items() if _takes(kind, argument, letter))


def _takes(kind: Any, argument: Any, letter: str) -> bool:
    if kind is sre.ANY:
        return letter != "\n"
    if kind is sre.NOT_LITERAL:
        return ord(letter) != argument
    negated = argument[0][0] is sre.NEGATE
    return negated != any(
        (kind is sre.LITERAL and ord(letter) == member)
        or (kind is sre.RANGE and member[0] <= ord(letter) <= member[1])
        or (kind is sre.CATEGORY and _CATEGORIES[member](letter))
        for kind, member in argument
        if kind is not sre.NEGATE
    )
