"""A release: the changelog's newest version is the package's, and the recipe builds wheels for its Pythons."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from support.paths import ROOT
from support.peers import PYTHONS, pyproject

HEADING = re.compile(r"^## \[(.+)\] - (?:unreleased|\d{4}-\d{2}-\d{2})$")


def test_the_changelog_begins_with_this_version() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    versions = [match[1] for match in map(HEADING.match, headings) if match]
    assert len(versions) == len(headings) == len(set(versions)), headings
    assert versions[0] == pyproject()["project"]["version"]


def test_wheels_are_built_for_the_pythons_that_are_tested() -> None:
    pattern = pyproject()["tool"]["cibuildwheel"]["build"]
    built = [minor for minor in range(20) if fnmatchcase(f"cp3{minor}-manylinux_aarch64", pattern)]
    assert [f"3.{minor}" for minor in built] == list(PYTHONS)
    assert not fnmatchcase("cp314t-manylinux_x86_64", pattern) and not fnmatchcase("cp314-musllinux_x86_64", pattern)
