"""Pickles and imports of the modules that public names have left."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib import import_module

import pytest

from fastsample.moved import _EARLIER

NAMES = [(module, name) for module, names in _EARLIER.items() for name in names]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_an_earlier_name_is_the_thing_itself(module: str, name: str) -> None:
    place, _, renamed = _EARLIER[module][name].partition(":")
    wanted = getattr(import_module(place), renamed or name)
    assert pickle.loads(f"c{module}\n{name}\n.".encode()) is wanted
    assert getattr(import_module(module), name) is wanted


def test_a_pickle_needs_no_import_before_it() -> None:
    """As users load one: `import fastsample` alone, without fastsample.lora."""
    code = "import fastsample, pickle; print(pickle.loads(b'cfastsample.ops.lora_pack\\nPackedLinear\\n.'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "<class 'fastsample.ops.lora.weights.PackedLinear'>\n", done.stderr


def test_other_names_are_refused() -> None:
    with pytest.raises(ImportError, match="Karras"):
        from fastsample.levels import Karras  # noqa: F401
