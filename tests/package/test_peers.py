"""Versions of other packages: what the lock pins on every Python and platform, and what may be installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.peers import PYTHONS, beside_the_lock, lock, outside, ranges

# A CUDA build of torch pins them itself.
TORCHS_OWN = ("nvidia-", "cuda-")


def environment(python: str, platform: str) -> dict[str, str]:
    return {
        **default_environment(),  # type: ignore[dict-item]
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "extra": "",
    }


def applies(marker: Marker | None, where: dict[str, str]) -> bool:
    return marker is None or marker.evaluate(where)


def test_what_is_installed_lies_in_the_ranges() -> None:
    """Within them the tests have to pass, also beside the lock: the header names what lies there."""
    assert outside(ranges()) == []


@pytest.mark.parametrize(
    ("requirement", "named"),
    [
        ("numpy", False),
        ("numpy<0.1", True),
        ("numpy<0.1; python_version < '3'", False),
        ("no-such-package<0.1", False),
        ("torch<0.1", True),
    ],
    ids=["any", "older", "another-python", "not-installed", "local-version"],
)
def test_what_is_outside_is_named(requirement: str, named: bool) -> None:
    found = outside([Requirement(requirement)])
    assert len(found) == named
    assert all(text.startswith(requirement.split("<")[0]) and text.endswith("(not <0.1)") for text in found)


def test_the_header_names_what_lies_beside_the_lock() -> None:
    header = beside_the_lock()
    assert "constraints.txt" in header and all(text in header for text in outside(lock()))


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_one_version_within_the_ranges(python: str, platform: str) -> None:
    where = environment(python, platform)
    pins: dict[str, Requirement] = {}
    for pin in lock():
        if applies(pin.marker, where):
            assert pin.name not in pins, "one version each"
            pins[pin.name] = pin
    for one in ranges():
        if applies(one.marker, where):
            [pinned] = pins[canonicalize_name(one.name)].specifier
            assert pinned.operator == "==" and one.specifier.contains(pinned.version), str(one)
            assert "+" not in pinned.version, "the index that users have knows no local versions"


def test_the_lock_is_complete() -> None:
    """It pins what pinned packages bring along, here; what others bring may be new."""
    where = environment(default_environment()["python_version"], default_environment()["sys_platform"])
    pins = {pin.name: pin for pin in lock() if applies(pin.marker, where)}
    assert not [name for name in pins if name.startswith(TORCHS_OWN)]
    left = [(canonicalize_name(one.name), frozenset(one.extras)) for one in ranges() if applies(one.marker, where)]
    seen = set(left)
    while left:
        name, extras = left.pop()
        assert name in pins, f"{name} is missing: python tools/lock.py"
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if outside([pins[name]]):
            continue
        for one in map(Requirement, installed.requires or []):
            wanted = any(applies(one.marker, {**where, "extra": extra}) for extra in ("", *extras))
            more = canonicalize_name(one.name), frozenset(one.extras)
            if wanted and not more[0].startswith(TORCHS_OWN) and more not in seen:
                seen.add(more)
                left.append(more)
    assert len(seen) > len(ranges())
