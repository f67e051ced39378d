"""Where the checks run: the backends that are here, and why the others are absent."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastsample.ops.available import backends
from fastsample.ops.backend import Backend


@dataclass(frozen=True)
class Target:
    """A backend and the device it is tried on.

    Attributes:
        interpreted: Triton kernels that Python runs: small shapes only, and no times.
    """

    backend: Backend
    device: torch.device
    interpreted: bool = False


def targets_on(device: str | None, backend: str | None) -> tuple[list[Target], dict[str, str]]:
    """(where to run, why each other backend is absent).

    Raises:
        ValueError: for an unknown or absent backend. RuntimeError: for a device that torch does not have.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {place}: torch finds no such GPU")
        torch.empty(0, device=place)
    status = backends()
    if backend is not None and backend not in status:
        raise ValueError(f"--backend must be one of {', '.join(status)}, got {backend!r}")
    absent = {name: state["reason"] for name, state in status.items() if not state["available"]}
    interpreted = bool(status["triton"]["interpreted"])
    if place.type == "cpu":
        absent.setdefault("cuda", "it runs on a GPU, and --device is cpu")
        if not interpreted:
            absent.setdefault("triton", "it runs on a GPU, and --device is cpu; or with TRITON_INTERPRET=1, slowly")
    if backend in absent:
        raise ValueError(f"--backend {backend} cannot run here: {absent[backend]}")
    on_cpu = torch.device("cpu")
    every = [
        Target("reference", place),
        Target("cpu", on_cpu),
        Target("triton", place, interpreted),
        Target("cuda", place),
    ]
    here = [target for target in every if target.backend not in absent]
    compiled = [target for target in here if target.backend != "reference"]
    wanted = [target for target in here if backend in (None, target.backend) or target in compiled[:1]]
    return wanted, absent
