"""The CPU's family. Figures of one family say little about another, so results are named after it.

AMD's models are those of Linux's bsp_init_amd (arch/x86/kernel/cpu/amd.c). Intel's models, and the steppings of model
0x55, were written down without a source at hand.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
AMD, INTEL = "AuthenticAMD", "GenuineIntel"
# By vendor and CPUID family: a name, and its first and last model.
_MODELS: Mapping[tuple[str, int], tuple[tuple[str, int, int], ...]] = {
    (AMD, 0x17): (
        ("Zen", 0x00, 0x2F),
        ("Zen 2", 0x30, 0x4F),
        ("Zen", 0x50, 0x5F),
        ("Zen 2", 0x60, 0x7F),
        ("Zen 2", 0x90, 0x91),
        ("Zen 2", 0xA0, 0xAF),
    ),
    (AMD, 0x19): (
        ("Zen 3", 0x00, 0x0F),
        ("Zen 4", 0x10, 0x1F),
        ("Zen 3", 0x20, 0x5F),
        ("Zen 4", 0x60, 0xAF),
    ),
    (AMD, 0x1A): (("Zen 5", 0x00, 0x2F), ("Zen 5", 0x40, 0x4F), ("Zen 5", 0x60, 0x7F)),
    (INTEL, 6): (
        ("Haswell", 0x3F, 0x3F),
        ("Broadwell", 0x4F, 0x4F),
        ("Ice Lake", 0x6A, 0x6A),
        ("Ice Lake", 0x6C, 0x6C),
        ("Sapphire Rapids", 0x8F, 0x8F),
        ("Granite Rapids", 0xAD, 0xAE),
        ("Emerald Rapids", 0xCF, 0xCF),
    ),
}
# Three generations of servers share this model: a name, and its first and last stepping.
_SKYLAKE_MODEL = 0x55
_SKYLAKE_STEPPINGS = (("Skylake", 0, 4), ("Cascade Lake", 5, 7), ("Cooper Lake", 10, 11))
NAMES = tuple(dict.fromkeys(name for models in (*_MODELS.values(), _SKYLAKE_STEPPINGS) for name, _, _ in models))


@cache
def model() -> str:
    """What this CPU calls itself: AMD EPYC."""
    return _fields(_cpuinfo()).get("model name") or platform.processor() or platform.machine()


@cache
def family() -> str:
    """The family of this CPU: Zen 4."""
    return family_of(_cpuinfo())


def family_of(cpuinfo: str) -> str:
    """The family in the text of /proc/cpuinfo, or what numbers it gives; without any, the machine's architecture."""
    fields = _fields(cpuinfo)
    if "vendor_id" in fields and "cpu family" in fields and "model" in fields:
        vendor, number, model = fields["vendor_id"], int(fields["cpu family"]), int(fields["model"])
        known, key = _MODELS.get((vendor, number), ()), model
        if (vendor, number, model) == (INTEL, 6, _SKYLAKE_MODEL):
            # Some virtual machines say "unknown".
            stepping = fields.get("stepping", "")
            known, key = _SKYLAKE_STEPPINGS, int(stepping) if stepping.isdigit() else -1
        named = (name for name, first, last in known if first <= key <= last)
        return next(named, f"{vendor} family {number} model {model}")
    if "CPU implementer" in fields and "CPU part" in fields:
        return f"aarch64 implementer {fields['CPU implementer']} part {fields['CPU part']}"
    return platform.machine()


def slug(family: str) -> str:
    """What result files are named after: Zen 4 is zen4, Sapphire Rapids is sapphire-rapids."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r" (?=\d)", "", family.lower())).strip("-")


def _fields(cpuinfo: str) -> dict[str, str]:
    """Of the first core."""
    lines = (line.partition(":") for line in cpuinfo.strip().split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _cpuinfo() -> str:
    try:
        return CPUINFO.read_text()
    except OSError:
        return ""
