"""PEFT's patterns give what re.match gives, and what would never end is bounded."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsample.lora.files import patterns
from fastsample.lora.files.patterns import Patterns


def expected(pattern: str, path: str) -> bool:
    """As PEFT's get_pattern_key does it."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


PATHS = [
    "q",
    "block.q",
    "block.0.q",
    "unet.block.12.to_q",
    "blocks_q",
    "a.b.c.d",
    "",
    "a\nb.q",
    "q\n",
    "layers.10.self_attn.k_proj",
]
PATTERNS = [
    "q",
    "block.q",
    r"block\.q",
    ".*q",
    "^q",
    r"^block\..*q$",
    r"\d+\.q",
    "[a-z]+",
    r"[^.]*\.q",
    "(block|a).(q|b)",
    "(?:a|b)*",
    r"layers\.[0-9]{1,2}\..*",
    "b?lock.*",
    "a.b.c.d|q",
    r"\bq",
    r".*\Bq",
    r"\w+",
    r"[\d_]+",
    r"[^\W_]+",
    "(?=.*q).*",
    "(?!.*q).*",
    "()*q",
    "(a*)*",
    "(a|a.)*b.*",
    "q{0}",
    "q{2,}",
    ".*?q",
    r"\Aq\Z",
    r"\s*",
    "a\nb.*",
    "",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_what_re_matches(pattern: str) -> None:
    one = Patterns({pattern: True})
    for path in PATHS:
        assert bool(one.value(path)) == expected(pattern, path), path


PART = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "^", "$", r"\b"])
TEXT = st.recursive(
    PART,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(TEXT, st.text("ab.\n", max_size=8))
def test_any_pattern_matches_what_re_matches(pattern: str, path: str) -> None:
    assert bool(Patterns({pattern: True}).value(path)) == expected(pattern, path)


def test_the_first_to_match_counts() -> None:
    assert Patterns({"x": 1, ".*q": 2, "q": 3}).value("a.q") == 2
    assert Patterns({"q": 3, ".*q": 2}).value("a.q") == 3


ENDLESS = [
    "(a+)+b",
    "(a|a)*b",
    "(.*)*b",
    "(a|aa)+$b",
    ".*.*.*.*.*.*b",
    "((a*)*)*b",
    "(a{1,99}){1,99}b",
    "(a?){150}a{99}b",
]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_never_end_do(pattern: str) -> None:
    start = time.process_time()
    assert Patterns({pattern: 1}).value("a" * 200) is None
    assert Patterns({pattern: 1}).value("a" * 200 + "b") == (None if "$" in pattern else 1)
    assert time.process_time() - start < 5


def test_too_long_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_STEPS", 100)
    one = Patterns({"(a*b*)*c": 1})
    with pytest.raises(ValueError, match=r"'\(a\*b\*\)\*c', which takes too long"):
        one.value("ab" * 100)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"q(": 1}, r"'q\(', no regular expression", id="half"),
        pytest.param({r"(a)\1": 1}, "groupref", id="back-reference"),
        pytest.param({"(?<=a)b": 1}, "assert", id="looking-behind"),
        pytest.param({"(?i)a": 1}, "options", id="options"),
        pytest.param({"(?i:a)": 1}, "subpattern", id="options-of-a-group"),
        pytest.param({"a{99999999999}": 1}, "no regular expression", id="count"),
        pytest.param({"a" * 999 + ".*": 1}, "1001 letters", id="long"),
        pytest.param({"(" * 30 + "a" + ")" * 30: 1}, "20 levels", id="deep"),
        pytest.param({"(" * 490 + "a" + ")" * 490: 1}, "levels|no regular", id="deeper"),
        pytest.param({f"a{i}": 1 for i in range(9000)}, "9000 patterns", id="many"),
    ],
)
def test_patterns_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Patterns(values)
