"""What users can call, and the bits they get, are those on record (see support/public.py)."""

from __future__ import annotations

import json

import pytest

from fastsample.samplers import catalogue
from support.public import FILE, bits, signatures

RECORD = json.loads(FILE.read_text())


def test_no_public_name_has_gone_and_none_has_come_unnoticed() -> None:
    assert sorted(signatures()) == sorted(RECORD["signatures"])


@pytest.mark.parametrize("name", RECORD["signatures"])
def test_parameters(name: str) -> None:
    assert signatures()[name] == RECORD["signatures"][name]


def test_every_sampler_gives_the_bits_on_record() -> None:
    assert bits() == RECORD["bits"]


def test_every_sampler_has_a_run_on_record() -> None:
    functions = [name for name in catalogue.__all__ if not isinstance(getattr(catalogue, name), type)]
    assert not [name for name in functions if not any(run.split()[0] == name for run in RECORD["bits"])]
