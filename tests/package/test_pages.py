"""README, CONTRIBUTING and docs as texts: short lines, links that lead somewhere, a reference that names everything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastsample
from support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_lines_are_short(page: Path) -> None:
    lines = enumerate(page.read_text().splitlines(), start=1)
    assert [number for number, line in lines if len(line) > 160 and not line.startswith("|")] == []


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: named(value) if isinstance(value, Path) else value)
def test_links_lead_somewhere(page: Path, link: str) -> None:
    file, _, heading = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    assert target.is_file()
    headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE) if heading else []
    assert not heading or heading in [anchor(title) for title in headings]


def anchor(title: str) -> str:
    """What a heading is called in links to it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_reference_names_all_that_is_public() -> None:
    page = (ROOT / "docs" / "reference" / "README.md").read_text()
    rooms = ("lora", "ops", "zoo")
    public = {f"fastsample.{name}" for name in fastsample.__all__ if name not in rooms}
    for room in rooms:
        public |= {f"fastsample.{room}.{name}" for name in getattr(fastsample, room).__all__}
    described = re.findall(r"`(fastsample\.[\w.]+)`", page)
    assert set(described) == public and len(described) == len(public)
