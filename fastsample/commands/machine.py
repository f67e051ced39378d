"""The machine that a command runs on: its CPU, and how busy it is with other work."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
BUSY = 0.5  # from this load on other programs make themselves felt in what is measured


def cpu_name() -> str:
    """What the CPU calls itself."""
    try:
        lines = (line.partition(":") for line in _CPUINFO.read_text().splitlines())
        names = [value.strip() for name, _, value in lines if name.strip() == "model name"]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Programs that wanted to run in the last minute, by CPUs: 1 keeps all of them busy. None where no system tells."""
    try:
        return os.getloadavg()[0] / cpus()
    except (AttributeError, OSError):
        return None


def load_text(share: float | None) -> str:
    """A load in words.

    Example:
        >>> load_text(0.9)
        '90 % of the CPUs in the minute before'
    """
    return "unknown" if share is None else f"{100 * share:.0f} % of the CPUs in the minute before"
