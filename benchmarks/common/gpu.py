"""What benchmarks need of a GPU: clocks that read its events or wait for it, cold caches, its name for the results."""

from __future__ import annotations

import re
import subprocess
from itertools import repeat
from time import perf_counter

import torch

import fastsample
from benchmarks.common.harness import Candidate, Clock

FLUSH_BYTES = 2**28  # more than any GPU's cache, and long enough to write that the host has the call ready meanwhile


def refusal(device: torch.device) -> str:
    """Why nothing can be measured there; empty where it can."""
    if not torch.cuda.is_available():
        return "torch finds no such GPU"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"torch finds {torch.cuda.device_count()} GPUs"
    status = fastsample.backends()
    absent = {name: status[name]["reason"] for name in ("cuda", "triton") if not status[name]["available"]}
    return "; ".join(f"{name}: {reason}" for name, reason in absent.items()) if len(absent) == 2 else ""


def events(device: torch.device) -> Clock:
    """A clock for single kernels: the device's own time of each call, which finds none of its operands in the cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(candidate: Candidate, calls: int) -> float:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        with torch.cuda.device(device):
            for start, end in pairs:
                if candidate.before is not None:
                    candidate.before()
                flush.zero_()
                start.record()
                candidate.call()
                end.record()
            torch.cuda.synchronize()
        return 1e-3 * sum(start.elapsed_time(end) for start, end in pairs)

    return seconds


def synchronised(device: torch.device) -> Clock:
    """A clock for whole runs, launches and Python included: the host's, which waits for the device at both ends."""

    def seconds(candidate: Candidate, calls: int) -> float:
        total = 0.0
        for _ in repeat(None, calls):
            if candidate.before is not None:
                candidate.before()
            torch.cuda.synchronize(device)
            start = perf_counter()
            candidate.call()
            torch.cuda.synchronize(device)
            total += perf_counter() - start
        return total

    return seconds


def name_of(device: torch.device) -> str:
    """NVIDIA H100 80GB HBM3."""
    return torch.cuda.get_device_name(device)


def slug(device: torch.device) -> str:
    """nvidia-h100-80gb-hbm3: what result files are named after."""
    return re.sub(r"[^a-z0-9]+", "-", name_of(device).lower()).strip("-")


def driver() -> str:
    """The driver's version; empty where nvidia-smi cannot be asked."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""
