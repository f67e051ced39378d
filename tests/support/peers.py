"""What is installed, against the lock in constraints.txt and the ranges in pyproject.toml."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.requirements import Requirement

from support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def pyproject() -> dict[str, Any]:
    """All tables of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def lock() -> list[Requirement]:
    """The pins; some packages have several, for different Pythons and platforms."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def ranges() -> list[Requirement]:
    """What the package and its extras ask for."""
    project = pyproject()["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [one for one in map(Requirement, texts) if one.name != project["name"]]


def outside(requirements: Iterable[Requirement]) -> list[str]:
    """Installed packages that a requirement rules out here, with both versions."""
    found = []
    for one in requirements:
        if one.marker is None or one.marker.evaluate():
            try:
                installed = version(one.name)
            except PackageNotFoundError:
                continue
            if not one.specifier.contains(installed, prereleases=True):
                found.append(f"{one.name} {installed} (not {one.specifier})")
    return found


def beside_the_lock() -> str:
    """A line that names what is installed in other versions than the lock's."""
    return f"beside constraints.txt: {', '.join(outside(lock())) or 'nothing'}"
