"""ops.step on random examples; `cd tests && python -m support.fuzz --examples 20000` tries as many as one likes."""

from __future__ import annotations

from hypothesis import given, settings

from support.levels import needs_cpu
from support.step_examples import Example, check, examples


@needs_cpu
@settings(max_examples=150, deadline=None, derandomize=True)
@given(examples())
def test_steps_match_the_formula(example: Example) -> None:
    check(example)
